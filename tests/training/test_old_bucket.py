"""Buckets with checkpoints of format 1 and of format 2 are listed, verified, continued and exported by today's code.

`tests/fixtures/make_bucket.py` made them. The code of commit 4693f37 wrote `bucket_v1`.
Only command lines are used here, so that no change of modules can hide a change of the bucket.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fixtures.make_bucket import INPUTS, MADE_ON, RUNS, STEPS, cpu, train

ROOT = Path(__file__).resolve().parents[2]
BUCKETS = {format_: ROOT / "tests" / "fixtures" / f"bucket_v{format_}" for format_ in (1, 2)}
CURRENT = max(BUCKETS)
"""The format that today's code writes."""
OLDER, NEWEST = STEPS
MEASURED = {"time", "attempt", "step_s", "train_s", "tokens_per_s", "gpu_peak_gib", "host_peak_gib"}
"""Fields of a step's event that differ between attempts."""
OTHER_MACHINE, OTHER_SHAPE = 1e-5, 2e-5
"""How far a loss may be off."""
HAS_COMPILER = shutil.which("g++") and (
    shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists()
)
PINNED = pytest.mark.skipif(not shutil.which("taskset"), reason="no taskset to give a process one core")
EVERY = [(format_, run) for format_ in BUCKETS for run in RUNS]
SAMPLE = {(1, "sft_full"), (2, "dpo_lora"), *((format_, run) for format_, run in EVERY if RUNS[run][1] > 1)}
"""Every engine and format once."""


def cases(*which: tuple[int, str], sample: Collection[tuple[int, str]] = SAMPLE) -> pytest.MarkDecorator:
    """Repeat a test for runs, each of a format. Those outside of the sample are thorough."""
    return pytest.mark.parametrize(
        ("version", "run"),
        [
            pytest.param(
                *each, marks=() if each in sample else pytest.mark.thorough, id=f"v{each[0]}-{each[1]}"
            )
            for each in which
        ],
    )


def command(module: str, *words: str) -> str:
    """The output of one of our commands, which has to succeed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def events(run: Path, attempt: int, kind: str) -> list[dict[str, Any]]:
    """What an attempt told of one kind, without what it measured."""
    lines = (run / "events" / f"{attempt:04d}.jsonl").read_text().splitlines()
    told = [event for event in map(json.loads, lines) if event["kind"] == kind]
    return [{key: value for key, value in event.items() if key not in MEASURED} for event in told]


def steps(run: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """What an attempt told of each step."""
    return {event["step"]: event for event in events(run, attempt, "step")}


def manifest(run: Path) -> dict[str, Any]:
    """The newest commit of a checkpoint."""
    return dict(json.loads((run / "commits" / f"step-{NEWEST:08d}.json").read_text()))


def details(run: Path) -> dict[str, Any]:
    """What the newest commit says of its attempt."""
    return dict(manifest(run)["details"])


def checksums(run: Path) -> dict[str, str]:
    """The checksum of each rank's file in the newest checkpoint."""
    files = manifest(run)["files"]
    return {file["path"]: file["xxh3"] for file in files if file["path"].startswith("rank-")}


def weights(folder: Path) -> dict[str, Any]:
    """Return the weights of a model or of an adapter."""
    [file] = folder.glob("*model.safetensors")
    return dict(load_file(file))


def assert_equal(one: Path, other: Path) -> None:
    """Two folders hold the same weights, to the last bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def bucket(tmp_path: Path, version: int) -> Path:
    """A copy of the whole bucket of this format."""
    return shutil.copytree(BUCKETS[version], tmp_path / "bucket")


@pytest.fixture
def cut(bucket: Path) -> Path:
    """A copy of the bucket in which each run ends with its older checkpoint."""
    for run in RUNS:
        for commit in ("final", f"step-{NEWEST:08d}"):
            (bucket / run / "commits" / f"{commit}.json").unlink()
        shutil.rmtree(bucket / run / "final")
        shutil.rmtree(bucket / run / "checkpoints" / f"step-{NEWEST:08d}")
    return bucket


def skip_without_compiler(run: str) -> None:
    if "zero" in run and not HAS_COMPILER:
        pytest.skip("DeepSpeed compiles: no g++ or ninja here")


def finish(version: int, run: str, bucket: Path, *overrides: str, processes: int = 0) -> Path:
    """A run that one more attempt brought to its end.

    That attempt took the steps after the older checkpoint only.
    It computed no log-probabilities of a reference that the bucket keeps.
    """
    recipe, scratch = INPUTS / f"{run}.yaml", bucket.parent / "scratch"
    failed = train(ROOT, sys.executable, recipe, bucket, scratch, *overrides, processes=processes)
    assert not failed, failed
    assert [each.name for each in sorted((bucket / run / "attempts").iterdir())] == ["0001.json", "0002.json"]
    assert sorted(steps(bucket / run, 2)) == list(range(OLDER + 1, NEWEST + 1))
    kept = events(BUCKETS[version] / run, 1, "reference")
    assert [each["computed"] for each in events(bucket / run, 2, "reference")] == [0] * len(kept)
    return bucket / run


@cases(*EVERY)
def test_an_old_run_is_listed(bucket: Path, run: str) -> None:
    """The list has both checkpoints and the final model, and all are whole."""
    told = json.loads(command("launcher", "checkpoints", "list", str(bucket / run), "--json"))
    kept = [(each["kind"], each["step"], each["state"]) for each in told["checkpoints"]]
    assert kept == [
        ("final", NEWEST, "whole"),
        ("checkpoint", NEWEST, "whole"),
        ("checkpoint", OLDER, "whole"),
    ]
    assert {each["world_size"] for each in told["checkpoints"]} == {RUNS[run][1]}


@cases(*EVERY)
def test_an_old_run_verifies(bucket: Path, run: str) -> None:
    """Every byte of both checkpoints and of the final model agrees with its checksum."""
    told = json.loads(command("launcher", "checkpoints", "verify", str(bucket / run), "--json"))
    assert told["verified"] is True
    assert len(told["checkpoints"]) == len(STEPS) + 1


@pytest.mark.parametrize(("version", "name"), [(1, "optimizer.pt"), (2, "rank-00000.safetensors")])
def test_a_damaged_old_checkpoint_does_not_verify(bucket: Path, name: str) -> None:
    """One changed byte of an old checkpoint is found by its checksum."""
    [file] = bucket.glob(f"sft_full/checkpoints/step-{OLDER:08d}/*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "checkpoints", "verify", str(bucket / "sft_full"), "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    states = {(each["kind"], each["step"]): each["state"] for each in json.loads(done.stdout)["checkpoints"]}
    assert [which for which, state in states.items() if state == "broken"] == [("checkpoint", OLDER)]


@PINNED
@cases(*EVERY)
def test_a_finished_old_run_is_left_alone(bucket: Path, run: str) -> None:
    """The command of a finished run succeeds and changes no file."""
    before = {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()}
    assert not train(
        ROOT, sys.executable, INPUTS / f"{run}.yaml", bucket, bucket.parent / "scratch", processes=1
    )
    assert {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()} == before


def is_exact(version: int, now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Return whether two attempts, of which these are the details, have the same bits."""
    made_on = json.loads((INPUTS / MADE_ON).read_text())[BUCKETS[version].name]
    return cpu() == made_on and all(now[name] == then[name] for name in ("device", "packages", "threads"))


@PINNED
@cases(*EVERY)
def test_an_old_run_goes_on_exactly(cut: Path, version: int, run: str) -> None:
    """From the older checkpoint it takes the steps that it took then, with the same bits on the same machine.

    Its next checkpoint is of the current format.
    """
    skip_without_compiler(run)
    resumed, whole = finish(version, run, cut), BUCKETS[version] / run
    ours, theirs = steps(resumed, 2), steps(whole, 1)
    for step, told in ours.items():
        assert told["samples"] == theirs[step]["samples"]
        assert told["loss"] == pytest.approx(theirs[step]["loss"], abs=OTHER_MACHINE, rel=0)
    now, then = details(resumed), details(whole)
    assert (now["engine"], now["world_size"]) == (then["engine"], then["world_size"])
    assert manifest(resumed)["format"] == CURRENT
    if is_exact(version, now, then):
        assert all(told == theirs[step] for step, told in ours.items())
        assert_equal(resumed / "final", whole / "final")


@PINNED
@cases(
    *((format_, run) for format_, run in EVERY if RUNS[run][1] > 1),
    sample=[(1, "sft_fsdp2"), (2, "dpo_zero2")],
)
def test_an_old_run_goes_on_in_one_process(cut: Path, version: int, run: str) -> None:
    """A checkpoint of two processes goes on in one without an engine, and its losses differ by rounding only."""
    resumed = finish(version, run, cut, "engine=ddp", processes=1)
    assert (details(resumed)["engine"], details(resumed)["world_size"]) == ("single", 1)
    theirs = steps(BUCKETS[version] / run, 1)
    for step, told in steps(resumed, 2).items():
        assert told["samples"] == theirs[step]["samples"]
        assert told["loss"] == pytest.approx(theirs[step]["loss"], abs=OTHER_SHAPE, rel=0)


@PINNED
@cases(*((CURRENT, run) for run in RUNS), sample=[(CURRENT, "sft_fsdp2")])
def test_a_new_run_writes_what_an_old_one_wrote(tmp_path: Path, version: int, run: str) -> None:
    """Both evaluate and save at the same step, and go on. On the same machine the ranks' files have the same bits."""
    skip_without_compiler(run)
    failed = train(ROOT, sys.executable, INPUTS / f"{run}.yaml", tmp_path / "runs", tmp_path / "scratch")
    assert not failed, failed
    new, old = tmp_path / "runs" / run, BUCKETS[version] / run
    assert manifest(new)["format"] == CURRENT
    assert steps(new, 1).keys() == steps(old, 1).keys()
    if is_exact(version, details(new), details(old)):
        assert steps(new, 1) == steps(old, 1)
        assert checksums(new) == checksums(old)


@cases(*EVERY)
def test_an_old_checkpoint_is_exported(bucket: Path, tmp_path: Path, run: str) -> None:
    """The newest checkpoint is exported with the weights that the run ended with."""
    words = ("--step", str(NEWEST), "--into", str(tmp_path / "newest"))
    command("trainer", "export", str(bucket / run), *words)
    assert_equal(tmp_path / "newest", bucket / run / "final")


@cases(*EVERY, sample=[(1, "sft_fsdp2"), (2, "sft_full")])
def test_an_old_final_model_is_exported(bucket: Path, tmp_path: Path, run: str) -> None:
    """A final model is exported as it is."""
    command("trainer", "export", str(bucket / run), "--into", str(tmp_path / "final"))
    assert_equal(tmp_path / "final", bucket / run / "final")


@pytest.mark.parametrize("version", BUCKETS)
def test_an_old_adapter_is_merged(bucket: Path, tmp_path: Path) -> None:
    """The adapter of an old checkpoint is exported as one model with the base that it was trained on."""
    record = bucket / "dpo_lora" / "run.json"
    said = json.loads(record.read_text())
    said["recipe"]["model_name_or_path"] = os.fspath(INPUTS / "model")  # it was elsewhere then
    record.write_text(json.dumps(said))
    words = ("--step", str(NEWEST), "--merge", "--into", str(tmp_path / "merged"))
    command("trainer", "export", str(bucket / "dpo_lora"), *words)
    merged, base = weights(tmp_path / "merged"), weights(INPUTS / "model")
    changed = {name.split(".")[-2] for name in base if not np.array_equal(merged[name], base[name])}
    assert merged.keys() == base.keys()
    assert changed == {"q_proj", "v_proj"}


@PINNED
@pytest.mark.parametrize("version", [CURRENT])
def test_a_checkpoint_of_a_later_release_ends_the_attempt(bucket: Path) -> None:
    """The newest checkpoint has a format that is not known here. The attempt says which release reads it, and leaves the
    bucket's checkpoints as they are. It does not go on from the older checkpoint.
    """
    run = bucket / "sft_full"
    (run / "commits" / "final.json").unlink()
    newest = run / "commits" / f"step-{NEWEST:08d}.json"
    newest.write_text(json.dumps({**manifest(run), "format": 3, "release": "9.9"}))
    before = {path: path.read_bytes() for path in (run / "commits").iterdir()}
    done = subprocess.run(
        [
            sys.executable, "-m", "trainer", "run", str(INPUTS / "sft_full.yaml"), "--checkpoints", str(bucket),
            "--run-id", "sft_full", "--work", str(bucket.parent / "scratch"),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert "checkpoint format 3 of release 9.9" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (run / "commits").iterdir()} == before

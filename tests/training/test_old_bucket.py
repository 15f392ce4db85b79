"""A bucket that the code of commit 4693f37 wrote is listed, verified, continued and exported by today's.

`tests/fixtures/make_bucket_v1.py` made it.
Only command lines are used here, so that no change of modules can hide a change of the bucket.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fixtures.make_bucket_v1 import RUNS, STEPS, cpu, train

ROOT = Path(__file__).resolve().parents[2]
BUCKET, INPUTS = ROOT / "tests" / "fixtures" / "bucket_v1", ROOT / "tests" / "fixtures" / "bucket_v1_inputs"
OLDER, NEWEST = STEPS
MEASURED = {"time", "attempt", "step_s", "train_s", "tokens_per_s", "gpu_peak_gib", "host_peak_gib"}
"""Fields of a step's event that differ between attempts."""
OTHER_MACHINE, OTHER_SHAPE = 1e-5, 2e-5
"""How far a loss may be off."""
HAS_COMPILER = shutil.which("g++") and (
    shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists()
)
COMPILED = pytest.mark.skipif(not HAS_COMPILER, reason="DeepSpeed compiles: no g++ or ninja here")
PINNED = pytest.mark.skipif(not shutil.which("taskset"), reason="no taskset to give a process one core")
TRAINED = [pytest.param(run, marks=COMPILED) if "zero" in run else run for run in RUNS]


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


def details(run: Path) -> dict[str, Any]:
    """What the newest commit says of its attempt."""
    manifest = json.loads((run / "commits" / f"step-{NEWEST:08d}.json").read_text())
    return dict(manifest["details"])


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
def bucket(tmp_path: Path) -> Path:
    """A copy of the whole bucket."""
    return shutil.copytree(BUCKET, tmp_path / "bucket")


@pytest.fixture
def cut(bucket: Path) -> Path:
    """A copy of the bucket in which each run ends with its older checkpoint."""
    for run in RUNS:
        for commit in ("final", f"step-{NEWEST:08d}"):
            (bucket / run / "commits" / f"{commit}.json").unlink()
        shutil.rmtree(bucket / run / "final")
        shutil.rmtree(bucket / run / "checkpoints" / f"step-{NEWEST:08d}")
    return bucket


def finish(run: str, bucket: Path, *overrides: str, processes: int = 0) -> Path:
    """A run that one more attempt brought to its end.

    That attempt took the steps after the older checkpoint only.
    It computed no log-probabilities of a reference that the bucket keeps.
    """
    recipe, scratch = INPUTS / f"{run}.yaml", bucket.parent / "scratch"
    failed = train(ROOT, sys.executable, recipe, bucket, scratch, *overrides, processes=processes)
    assert not failed, failed
    assert [each.name for each in sorted((bucket / run / "attempts").iterdir())] == ["0001.json", "0002.json"]
    assert sorted(steps(bucket / run, 2)) == list(range(OLDER + 1, NEWEST + 1))
    kept = events(BUCKET / run, 1, "reference")
    assert [each["computed"] for each in events(bucket / run, 2, "reference")] == [0] * len(kept)
    return bucket / run


@pytest.mark.parametrize("run", RUNS)
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


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_verifies(bucket: Path, run: str) -> None:
    """Every byte of both checkpoints and of the final model agrees with its checksum."""
    told = json.loads(command("launcher", "checkpoints", "verify", str(bucket / run), "--json"))
    assert told["verified"] is True
    assert len(told["checkpoints"]) == len(STEPS) + 1


def test_a_damaged_old_checkpoint_does_not_verify(bucket: Path) -> None:
    """One changed byte of an old checkpoint is found by its checksum."""
    [file] = bucket.glob(f"sft_full/checkpoints/step-{OLDER:08d}/*/optimizer.pt")
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
@pytest.mark.parametrize("run", RUNS)
def test_a_finished_old_run_is_left_alone(bucket: Path, run: str) -> None:
    """The command of a finished run succeeds and changes no file."""
    before = {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()}
    assert not train(
        ROOT, sys.executable, INPUTS / f"{run}.yaml", bucket, bucket.parent / "scratch", processes=1
    )
    assert {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()} == before


@PINNED
@pytest.mark.parametrize("run", TRAINED)
def test_an_old_run_goes_on_exactly(cut: Path, run: str) -> None:
    """From the older checkpoint it takes the steps that it took then, with the same bits on the same machine."""
    resumed, whole = finish(run, cut), BUCKET / run
    ours, theirs = steps(resumed, 2), steps(whole, 1)
    for step, told in ours.items():
        assert told["samples"] == theirs[step]["samples"]
        assert told["loss"] == pytest.approx(theirs[step]["loss"], abs=OTHER_MACHINE, rel=0)
    same = ("device", "packages", "threads")
    now, then = details(resumed), details(whole)
    assert (now["engine"], now["world_size"]) == (then["engine"], then["world_size"])
    machine = json.loads((INPUTS / "made_on.json").read_text())
    if cpu() == machine["cpu"] and all(now[name] == then[name] for name in same):
        assert all(told == theirs[step] for step, told in ours.items())
        assert_equal(resumed / "final", whole / "final")


@PINNED
@pytest.mark.parametrize("run", [run for run, (_, processes) in RUNS.items() if processes > 1])
def test_an_old_run_goes_on_in_one_process(cut: Path, run: str) -> None:
    """A checkpoint of two processes goes on in one without an engine, and its losses differ by rounding only."""
    resumed = finish(run, cut, "engine=ddp", processes=1)
    assert (details(resumed)["engine"], details(resumed)["world_size"]) == ("single", 1)
    theirs = steps(BUCKET / run, 1)
    for step, told in steps(resumed, 2).items():
        assert told["samples"] == theirs[step]["samples"]
        assert told["loss"] == pytest.approx(theirs[step]["loss"], abs=OTHER_SHAPE, rel=0)


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_is_exported(bucket: Path, tmp_path: Path, run: str) -> None:
    """The final model and the newest checkpoint are exported with the weights that the run ended with."""
    for name, words in (("final", ()), ("newest", ("--step", str(NEWEST)))):
        command("trainer", "export", str(bucket / run), *words, "--into", str(tmp_path / name))
        assert_equal(tmp_path / name, BUCKET / run / "final")


def test_an_old_adapter_is_merged(bucket: Path, tmp_path: Path) -> None:
    """An old adapter is exported as one model with the base that it was trained on."""
    record = bucket / "dpo_lora" / "run.json"
    said = json.loads(record.read_text())
    said["recipe"]["model_name_or_path"] = os.fspath(INPUTS / "model")  # it was elsewhere then
    record.write_text(json.dumps(said))
    command("trainer", "export", str(bucket / "dpo_lora"), "--merge", "--into", str(tmp_path / "merged"))
    merged, base = weights(tmp_path / "merged"), weights(INPUTS / "model")
    changed = {name.split(".")[-2] for name in base if not np.array_equal(merged[name], base[name])}
    assert merged.keys() == base.keys()
    assert changed == {"q_proj", "v_proj"}

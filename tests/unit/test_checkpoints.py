"""`launcher checkpoints`: a run's checkpoints are listed, verified, pulled and pruned from any machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.checkpoints.pull import bar
from launcher.cli import main
from tests.harness import ROOT, wait_until
from tests.servers.s3 import FaultyS3
from trainer.bucket import Bucket, attempts, open_run
from trainer.bucket.commit import commit
from trainer.bucket.manifest import committed
from trainer.staged import Staged

RUN = "a-run"
FILES = {"model.safetensors": b"weights" * 5000, "nested/empty": b"", "state.json": b"{}"}
DETAILS = {"world_size": 8, "engine": "zero3"}


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Type = Callable[..., Answer]


@pytest.fixture
def launcher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Type:
    """Run `launcher checkpoints …` without a terminal, and return its exit code and output."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*words: str | Path) -> Answer:
        with pytest.raises(SystemExit) as ended:
            main(["checkpoints", *map(str, words)])
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return run


def save(
    bucket: Bucket, attempt: attempts.Attempt, staging: Path, step: int, kind: str = "checkpoint"
) -> None:
    shutil.rmtree(staging, ignore_errors=True)  # a folder's bucket may hold links to what was staged
    for name, data in FILES.items():
        path = staging / "saved" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + step.to_bytes(4) if data else data)
    staged = Staged.model_validate({"folder": "saved", "step": step, "kind": kind, "details": DETAILS})
    commit(bucket, attempt, staging, staged, "digest")


def fill(uri: str, staging: Path, *, steps: tuple[int, ...] = (2, 4, 6), final: bool = False) -> Bucket:
    """Make a run of one attempt with checkpoints of these steps."""
    bucket = open_run(uri, RUN)
    attempt = attempts.claim(bucket, {})
    for step in steps:
        save(bucket, attempt, staging, step)
    if final:
        save(bucket, attempt, staging, steps[-1], "final")
    return bucket


def key_of(step: int, name: str = "model.safetensors") -> str:
    return f"checkpoints/step-{step:08d}/0001/{name}"


def damage(bucket: Bucket, key: str) -> None:
    data = bytearray(bucket.get(key))
    data[len(data) // 2] ^= 1
    bucket.put(key, bytes(data))


def keys(bucket: Bucket) -> list[str]:
    return [item.key for item in bucket.list()]


def test_list_shows_what_is_committed_newest_first(uri: str, tmp_path: Path, launcher: Type) -> None:
    """The list has every checkpoint and the final model with attempt, size, world size and engine."""
    fill(uri, tmp_path / "staging", final=True)
    output = launcher("list", f"{uri}/{RUN}", "--json").json
    rows = output["checkpoints"]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("final", 6),
        ("checkpoint", 6),
        ("checkpoint", 4),
        ("checkpoint", 2),
    ]
    assert rows[1].keys() == {
        "step", "kind", "attempt", "created", "files", "bytes", "world_size", "engine", "state", "reason",
    }  # fmt: skip
    assert (rows[1]["attempt"], rows[1]["files"], rows[1]["bytes"]) == (1, 3, 35010)
    assert (rows[1]["world_size"], rows[1]["engine"], rows[1]["state"]) == (8, "zero3", "whole")
    assert output["uncommitted"] == {"files": 0, "bytes": 0}
    assert "34.2 KiB" in launcher("list", f"{uri}/{RUN}").out


def test_list_reports_broken_checkpoints_and_uncommitted_files(
    uri: str, tmp_path: Path, launcher: Type
) -> None:
    """The list reports missing files, an unreadable manifest, and files of an upload that never ended."""
    bucket = fill(uri, tmp_path / "staging")
    bucket.delete([key_of(4)])
    bucket.put("commits/step-00000002.json", b'{"run_id"')
    bucket.put(key_of(8), b"half")
    output = launcher("list", f"{uri}/{RUN}", "--json").json
    assert [(row["step"], row["state"]) for row in output["checkpoints"]] == [
        (6, "whole"),
        (4, "broken"),
        (2, "broken"),
    ]
    assert "is missing" in output["checkpoints"][1]["reason"]
    assert output["checkpoints"][2]["bytes"] is None
    assert output["uncommitted"]["files"] == 4
    answer = launcher("list", f"{uri}/{RUN}")
    assert answer.code == 0
    assert "uncommitted: 4 files" in answer.out


def test_verify_reads_every_byte_and_names_the_file_that_differs(
    uri: str, tmp_path: Path, launcher: Type
) -> None:
    """A flipped bit in the bucket is exit code 1, and the other checkpoints verify."""
    bucket = fill(uri, tmp_path / "staging", final=True)
    assert launcher("verify", f"{uri}/{RUN}").code == 0
    damage(bucket, key_of(4))
    answer = launcher("verify", f"{uri}/{RUN}", "--json")
    states = {(row["kind"], row["step"]): row["state"] for row in answer.json["checkpoints"]}
    assert answer.code == 1
    assert answer.json["verified"] is False
    assert [place for place, state in states.items() if state != "verified"] == [("checkpoint", 4)]
    (reason,) = next(row["failures"] for row in answer.json["checkpoints"] if row["step"] == 4)
    assert key_of(4) in reason
    assert key_of(4) in launcher("verify", f"{uri}/{RUN}").out
    assert launcher("verify", f"{uri}/{RUN}", "--step", "6").code == 0
    assert launcher("verify", f"{uri}/{RUN}", "--final").code == 0


def test_verify_finds_a_bit_that_flips_during_the_transfer(
    s3: str, faulty_s3: FaultyS3, tmp_path: Path, launcher: Type
) -> None:
    """A bit that flips during the transfer is found, and the file is named."""
    fill(s3, tmp_path / "staging")
    faulty_s3.flip_bit("step-00000006/.*/state.json")
    answer = launcher("verify", f"{s3}/{RUN}")
    assert answer.code == 1
    assert key_of(6, "state.json") in answer.out


def test_verify_finds_what_a_listing_shows_too(uri: str, tmp_path: Path, launcher: Type) -> None:
    """A missing file and a truncated manifest fail the verification."""
    bucket = fill(uri, tmp_path / "staging")
    bucket.delete([key_of(4)])
    bucket.put("commits/step-00000002.json", b"")
    answer = launcher("verify", f"{uri}/{RUN}", "--json")
    assert answer.code == 1
    assert [row["state"] for row in answer.json["checkpoints"]] == ["verified", "broken", "broken"]


@pytest.mark.parametrize(
    ("options", "step"), [([], 6), (["--step", "4"], 4), (["--final"], 6)], ids=["newest", "step", "final"]
)
def test_pull_brings_the_newest_or_what_is_named(
    uri: str, tmp_path: Path, launcher: Type, options: list[str], step: int
) -> None:
    """A pull brings exactly the files of the checkpoint, and a second pull downloads nothing."""
    fill(uri, tmp_path / "staging", final=True)
    dest = tmp_path / "here"
    first = launcher("pull", f"{uri}/{RUN}", dest, *options, "--json").json
    assert (first["step"], first["fetched_files"], first["failures"]) == (step, 3, [])
    there = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    assert there == set(FILES)
    assert (dest / "model.safetensors").read_bytes() == FILES["model.safetensors"] + step.to_bytes(4)
    again = launcher("pull", f"{uri}/{RUN}", dest, *options)
    assert again.code == 0
    assert "3 files" in again.out


def test_the_newest_that_is_whole_is_pulled(uri: str, tmp_path: Path, launcher: Type) -> None:
    """A checkpoint with a missing file is skipped, as a recovery skips it."""
    fill(uri, tmp_path / "staging").delete([key_of(6)])
    assert launcher("pull", f"{uri}/{RUN}", tmp_path / "here", "--json").json["step"] == 4
    answer = launcher("pull", f"{uri}/{RUN}", tmp_path / "there", "--step", "6")
    assert (answer.code, "is missing" in answer.err) == (2, True)


def test_a_pull_that_was_killed_fetches_only_what_is_missing(
    s3: str, faulty_s3: FaultyS3, tmp_path: Path, launcher: Type
) -> None:
    """Repeating the command resumes the same checkpoint, even if a newer one was committed in between."""
    bucket = fill(s3, tmp_path / "staging", steps=(2, 4))
    dest = tmp_path / "here"
    faulty_s3.hold("GET", key_of(4))
    command = [sys.executable, "-m", "launcher", "checkpoints", "pull", f"{s3}/{RUN}", str(dest)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert faulty_s3.wait_for_held(60)
        wait_until(
            lambda: (dest / "state.json").exists() and (dest / "nested/empty").exists(), "the other files"
        )
        process.kill()
    faulty_s3.clear()
    save(bucket, attempts.claim(bucket, {}), tmp_path / "staging", 6)
    seen = len(faulty_s3.requests)
    pulled = launcher("pull", f"{s3}/{RUN}", dest, "--json").json
    assert (pulled["step"], pulled["fetched_files"]) == (4, 1)
    fetched = {request.key for request in faulty_s3.requests[seen:] if "checkpoints/" in request.key}
    assert fetched == {f"runs/{RUN}/{key_of(4)}"}
    assert sorted(path.name for path in dest.iterdir()) == ["model.safetensors", "nested", "state.json"]


def test_a_pull_of_a_damaged_file_keeps_the_rest_and_is_mended_by_the_same_command(
    s3: str, faulty_s3: FaultyS3, tmp_path: Path, launcher: Type
) -> None:
    """A file that does not verify is not written under its name, and repeating the command downloads only that file."""
    fill(s3, tmp_path / "staging")
    dest = tmp_path / "here"
    faulty_s3.flip_bit(key_of(6))
    answer = launcher("pull", f"{s3}/{RUN}", dest)
    assert answer.code == 1
    assert key_of(6) in answer.err
    assert not (dest / "model.safetensors").exists()
    faulty_s3.clear()
    assert launcher("pull", f"{s3}/{RUN}", dest, "--json").json["fetched_files"] == 1


def test_a_file_that_was_changed_here_is_fetched_again_in_a_part(
    uri: str, tmp_path: Path, launcher: Type
) -> None:
    """In an unfinished pull a local file with the right size but another checksum is downloaded again."""
    bucket = fill(uri, tmp_path / "staging")
    dest = tmp_path / "here"
    whole = bucket.get(key_of(6))
    damage(bucket, key_of(6))
    assert launcher("pull", f"{uri}/{RUN}", dest).code == 1
    bucket.put(key_of(6), whole)
    (dest / "state.json").write_bytes(b"[]" + (6).to_bytes(4))
    assert launcher("pull", f"{uri}/{RUN}", dest, "--json").json["fetched_files"] == 2
    assert (dest / "state.json").read_bytes() == b"{}" + (6).to_bytes(4)


def test_a_folder_with_other_things_is_left_alone(uri: str, tmp_path: Path, launcher: Type) -> None:
    """A pull refuses a folder with other files, a file, another unfinished pull, and a finished pull that was changed."""
    bucket = fill(uri, tmp_path / "staging")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    assert "holds other files" in launcher("pull", f"{uri}/{RUN}", notes).err
    assert [path.name for path in notes.iterdir()] == ["mine.txt"]
    assert "is not a folder" in launcher("pull", f"{uri}/{RUN}", notes / "mine.txt").err
    damage(bucket, key_of(4))
    launcher("pull", f"{uri}/{RUN}", tmp_path / "part", "--step", "4")
    answer = launcher("pull", f"{uri}/{RUN}", tmp_path / "part", "--step", "6")
    assert (answer.code, "an unfinished pull of something else: step 4" in answer.err) == (2, True)
    launcher("pull", f"{uri}/{RUN}", tmp_path / "here")
    (tmp_path / "here" / "state.json").write_text("changed")
    assert "holds other files" in launcher("pull", f"{uri}/{RUN}", tmp_path / "here").err


def test_prune_shows_first_and_deletes_only_with_yes(uri: str, tmp_path: Path, launcher: Type) -> None:
    """Without --yes nothing is deleted; with it, all but the newest checkpoints and the final model are."""
    bucket = fill(uri, tmp_path / "staging", steps=(2, 4, 6, 8), final=True)
    before = keys(bucket)
    shown = launcher("prune", f"{uri}/{RUN}", "--keep", "2")
    assert "would delete 2 checkpoints (steps 2, 4), 6 files" in shown.out
    assert "add --yes" in shown.out
    assert keys(bucket) == before
    output = launcher("prune", f"{uri}/{RUN}", "--keep", "2", "--yes", "--json").json
    assert (output["steps"], output["kept"], output["files"], output["deleted"]) == ([2, 4], [8, 6], 6, True)
    assert [manifest.step for manifest in committed(bucket)] == [8, 6]
    assert launcher("verify", f"{uri}/{RUN}").code == 0
    assert "nothing to delete" in launcher("prune", f"{uri}/{RUN}", "--keep", "2", "--yes").out


def test_prune_counts_only_whole_checkpoints(uri: str, tmp_path: Path, launcher: Type) -> None:
    """A broken checkpoint does not count as one of the newest two that stay."""
    bucket = fill(uri, tmp_path / "staging", steps=(2, 4, 6))
    bucket.delete([key_of(6)])
    answer = launcher("prune", f"{uri}/{RUN}", "--keep", "2", "--yes")
    assert answer.code == 0
    assert [manifest.step for manifest in committed(bucket)] == [6, 4, 2]


def test_prune_leaves_an_upload_on_its_way(uri: str, tmp_path: Path, launcher: Type) -> None:
    """Files of lost machines below the newest commit are deleted; the newest attempt's upload stays."""
    bucket = fill(uri, tmp_path / "staging")
    bucket.put("checkpoints/step-00000005/0001/model.safetensors", b"left by attempt 1")
    attempts.claim(bucket, {})
    upload = "checkpoints/step-00000005/0002/model.safetensors"
    bucket.put(upload, b"on its way")
    output = launcher("prune", f"{uri}/{RUN}", "--keep", "3", "--yes", "--json").json
    assert (output["steps"], output["files"], output["deleted"]) == ([], 1, True)
    assert upload in keys(bucket)
    assert "checkpoints/step-00000005/0001/model.safetensors" not in keys(bucket)


@pytest.mark.parametrize("command", ["list", "verify", "pull", "prune"])
def test_a_run_that_is_not_there_is_named_with_the_nearest(
    uri: str, tmp_path: Path, launcher: Type, command: str
) -> None:
    """A misspelt run is an error with the nearest names, and creates no folder."""
    fill(uri, tmp_path / "staging")
    more = {"pull": [tmp_path / "here"], "prune": ["--keep", "2"]}.get(command, [])
    answer = launcher(command, f"{uri}/a-rum", *more)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: no run a-rum in ")
    assert "existing runs: a-run" in answer.err
    assert launcher("list", f"{uri}/{RUN}", "--json").json["run"] == RUN
    if "://" not in uri:
        assert not Path(uri, "a-rum").exists()


def test_an_address_that_is_no_run_is_an_error(
    tmp_path: Path, launcher: Type, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of runs, an empty folder, a missing bucket and an invalid address are errors with a hint."""
    fill(str(tmp_path / "runs"), tmp_path / "staging")
    monkeypatch.chdir(tmp_path)
    assert launcher("list", "runs/a-run").code == 0
    wrong = {
        "runs": "name one of a-run",
        "nowhere/a-run": "has no runs",
        "s3://no-such-bucket-here/runs/a-run": "no such bucket",
        f"{s3}/a-run": "has no runs",
        "s3://bucket": "names no run",
        "ftp://host/runs/a-run": "is not the address",
    }
    for uri, message in wrong.items():
        answer = launcher("list", uri)
        assert (uri, answer.code, message in answer.err, answer.out) == (uri, 2, True, "")
        assert "Traceback" not in answer.err
    assert not (tmp_path / "nowhere").exists()


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path, launcher: Type) -> None:
    """A missing step is an error with the existing ones; a missing final model and `--keep 1` are errors too."""
    uri = str(tmp_path / "runs")
    fill(uri, tmp_path / "staging")
    for command, more in {"list": [], "verify": [], "pull": [tmp_path / "here"]}.items():
        answer = launcher(command, f"{uri}/{RUN}", *more, "--step", "5")
        assert (answer.code, "existing steps: 6, 4, 2" in answer.err) == (2, True)
    answer = launcher("pull", f"{uri}/{RUN}", tmp_path / "here", "--final")
    assert (answer.code, "no final model yet" in answer.err) == (2, True)
    assert launcher("prune", f"{uri}/{RUN}", "--keep", "1", "--yes").code == 2
    assert launcher("pull", f"{uri}/{RUN}", tmp_path / "here", "--final", "--step", "2").code == 2


def test_a_run_with_nothing_committed(tmp_path: Path, launcher: Type) -> None:
    """Such a run can be listed, but there is nothing to verify or to pull."""
    uri = str(tmp_path / "runs")
    attempts.claim(open_run(uri, RUN), {})
    assert "nothing is committed yet" in launcher("list", f"{uri}/{RUN}").out
    assert launcher("verify", f"{uri}/{RUN}").code == 2
    assert launcher("pull", f"{uri}/{RUN}", tmp_path / "here").code == 2
    assert "nothing to delete" in launcher("prune", f"{uri}/{RUN}", "--keep", "2").out


def test_a_full_disk_is_reported_before_the_download(tmp_path: Path, launcher: Type) -> None:
    """If the disk is too small for the checkpoint, nothing is downloaded."""
    uri = str(tmp_path / "runs")
    bucket = fill(uri, tmp_path / "staging")
    larger = shutil.disk_usage(tmp_path).free + 2**30
    with (tmp_path / "runs" / RUN / key_of(6)).open("r+b") as file:
        file.truncate(larger)  # a hole: it takes no room
    manifest = json.loads(bucket.get("commits/step-00000006.json"))
    next(file for file in manifest["files"] if file["path"] == "model.safetensors")["size"] = larger
    bucket.put("commits/step-00000006.json", json.dumps(manifest).encode())
    answer = launcher("pull", f"{uri}/{RUN}", tmp_path / "here")
    assert (answer.code, "free some space" in answer.err) == (2, True)
    assert list((tmp_path / "here").iterdir()) == []


def test_ctrl_c_ends_a_transfer_with_its_next_piece() -> None:
    """The callback raises KeyboardInterrupt after a signal, and the old signal handler is restored."""
    before = signal.getsignal(signal.SIGINT)
    with bar(Console(), "bytes", 10) as tell:
        tell(1)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            tell(1)
    assert signal.getsignal(signal.SIGINT) is before

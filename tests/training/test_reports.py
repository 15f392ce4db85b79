"""Reports are of the run and not of an attempt: one curve, with every step once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.servers.stores import MemoryBucket
from tests.training.jobs import SMALL, make_job, train
from trainer.supervisor.transfers import TrackerSync
from trainer.worker import trackers

SFT = "zephyr-tiny/sft"


def test_tensorboard_shows_redone_steps_once(tmp_path: Path) -> None:
    """The second attempt takes step 3 and 4 again; what the first told of them is taken back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = train(make_job(tmp_path / "first", SFT, *SMALL, "report_to=tensorboard"))
    job = make_job(tmp_path / "second", SFT, *SMALL, "report_to=tensorboard", resume_from=first.checkpoint(2))
    second = train(job)
    assert second.outcome.status == "done"
    (one,), (other,) = (list((each.job.reports / "tensorboard").iterdir()) for each in (first, second))
    both = tmp_path / "bucket"
    both.mkdir()
    shutil.copy2(one, both / f"events.out.tfevents.1.{one.name.rpartition('.')[2]}")
    shutil.copy2(other, both / f"events.out.tfevents.2.{other.name.rpartition('.')[2]}")
    seen = EventAccumulator(str(both)).Reload()
    told = [(event.step, event.value) for event in seen.Scalars("train/loss")]
    assert [step for step, _ in told] == [1, 2, 3, 4]
    assert [value for _, value in told] == pytest.approx([line["loss"] for line in first.of("step")])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that what the worker sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_history(file: Path) -> list[dict[str, str]]:
    """Rows of W&B's file: records behind heads of 7 bytes (checksum, length, kind) in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
    return found


def test_wandb_is_one_run_told_its_steps(tmp_path: Path, offline: None) -> None:
    """Every attempt has the run's own id, resumes it, and names the step, so that W&B can drop what it has."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    first = train(make_job(tmp_path / "first", SFT, *SMALL, "report_to=wandb"))
    assert first.outcome.status == "done"
    assert os.environ["WANDB_RUN_ID"] == trackers.run_id(first.job)
    assert os.environ["WANDB_RESUME"] == "allow"
    wandb.finish()  # as the end of a process does: another process writes the file
    (file,) = first.job.reports.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{trackers.run_id(first.job)}.wandb"

    def steps() -> list[int]:
        return [int(row["_step"]) for row in wandb_history(file) if "train/loss" in row]

    wait_until(lambda: steps() == [1, 2, 3, 4], "the four steps to be in W&B's file")


def test_a_runs_id_is_its_own(tmp_path: Path) -> None:
    """The same at each attempt; a run of the same name in another bucket, or made anew, is another."""
    job = make_job(tmp_path / "job", SFT, *SMALL)
    later = job.model_copy(update={"attempt": 7, "work": tmp_path / "elsewhere"})
    assert trackers.run_id(job) == trackers.run_id(later)
    assert trackers.run_id(job) != trackers.run_id(job.model_copy(update={"report_id": "gs://other 2026"}))


def test_reports_are_copied_as_they_grow(tmp_path: Path) -> None:
    """Each file once more when it has changed; links and what is W&B's own are left out."""
    bucket = MemoryBucket()
    board, offline, online = (
        tmp_path / name for name in ("tensorboard", "wandb/offline-run-1/files", "wandb/run-2")
    )
    for folder in (board, offline, online):
        folder.mkdir(parents=True)
        (folder / "file").write_text("some")
    (tmp_path / "wandb" / "latest-run").symlink_to(online)
    mirror = TrackerSync(bucket, tmp_path)
    mirror.copy()
    (board / "file").write_text("more")
    mirror.copy()
    assert [each.key for each in bucket.list()] == [
        "reports/tensorboard/file",
        "reports/wandb/offline-run-1/files/file",
    ]
    assert bucket.get("reports/tensorboard/file") == b"more"

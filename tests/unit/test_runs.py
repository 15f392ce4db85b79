"""The history of a run, read from its events and commits."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.runs.run import Reader, Redone, RunHistory
from tests.fakes.runs import attempt_events, write_commit, write_events
from trainer.bucket import open_run
from trainer.bucket.address import canonical, folder_of
from trainer.errors import BucketError


def read(folder: Path) -> RunHistory:
    return Reader(open_run(str(folder), "a-run"), "a-run").read()


def test_a_run_that_never_began_is_new(tmp_path: Path) -> None:
    """An empty folder is a run without attempts."""
    run = read(tmp_path)
    assert (run.state, run.step, run.total_steps, run.wall_s, run.steps) == ("new", 0, None, 0.0, ())


def test_a_later_attempt_wins_for_a_repeated_step(tmp_path: Path) -> None:
    """Each step has one event, from the newest attempt that took it."""
    write_events(
        tmp_path / "a-run",
        attempt_events(1, start=0, last=14, total_steps=30),
        attempt_events(2, start=10, last=30, total_steps=30, end={"kind": "done", "step": 30}),
    )
    run = read(tmp_path)
    assert [event["step"] for event in run.steps] == list(range(1, 31))
    assert [event["attempt"] for event in run.steps] == [1] * 10 + [2] * 20
    assert run.steps[10]["loss"] == 1 / 11 + 2


def test_lost_steps_are_the_repeated_steps(tmp_path: Path) -> None:
    """Every attempt that repeats steps adds a span, even if the steps were repeated before."""
    write_events(
        tmp_path / "a-run",
        attempt_events(1, start=0, last=14, total_steps=30),
        attempt_events(2, start=10, last=12, total_steps=30),
        attempt_events(3, start=10, last=30, total_steps=30, end={"kind": "done", "step": 30}),
    )
    run = read(tmp_path)
    assert run.redone == (Redone(10, 12), Redone(10, 14))
    assert run.lost_steps == 6


def test_preemptions_count_lost_and_preempted_attempts(tmp_path: Path) -> None:
    """Failed and superseded attempts do not count."""
    write_events(
        tmp_path / "a-run",
        attempt_events(1, start=0, last=4, total_steps=30),
        attempt_events(2, start=0, last=4, total_steps=30, end={"kind": "preempted", "message": ""}),
        attempt_events(
            3, start=4, last=5, total_steps=30, end={"kind": "failed", "message": "", "exit_code": 75}
        ),
        attempt_events(4, start=4, last=5, total_steps=30, end={"kind": "superseded", "message": ""}),
        attempt_events(5, start=4, last=6, total_steps=30),
    )
    run = read(tmp_path)
    assert run.preemptions == 2
    assert run.state == "running"
    assert [attempt.number for attempt in run.restores] == [3, 4, 5]


@pytest.mark.parametrize("kind", ["preempted", "failed", "superseded", "done"])
def test_the_newest_attempt_decides_the_state(tmp_path: Path, kind: str) -> None:
    """The end event of the newest attempt sets the state."""
    write_events(
        tmp_path / "a-run",
        attempt_events(1, start=0, last=4, total_steps=30, end={"kind": "failed", "message": ""}),
        attempt_events(2, start=0, last=6, total_steps=30, end={"kind": kind, "message": ""}),
    )
    assert read(tmp_path).state == kind


def test_a_committed_final_model_makes_a_run_done(tmp_path: Path) -> None:
    """A run is done even if its machine is lost after the last commit and before the `done` event."""
    write_events(tmp_path / "a-run", attempt_events(1, start=0, last=30, total_steps=30))
    write_commit(tmp_path / "a-run", "final", created="2026-01-01T00:05:00Z")
    run = read(tmp_path)
    assert (run.state, run.finished) == ("done", "2026-01-01T00:05:00Z")
    assert run.final_uri.endswith("/a-run/final")


def test_commits_come_from_events_and_from_the_bucket(tmp_path: Path) -> None:
    """A commit without an event counts, and so does one that retention has removed."""
    write_events(tmp_path / "a-run", attempt_events(1, start=0, last=14, total_steps=30))
    write_commit(tmp_path / "a-run", "step-00000012")
    assert read(tmp_path).commits == (10, 12)


def test_a_reader_sees_new_events(tmp_path: Path) -> None:
    """A second read returns the new state of the run."""
    reader = Reader(open_run(str(tmp_path), "a-run"), "a-run")
    write_events(tmp_path / "a-run", attempt_events(1, start=0, last=4, total_steps=30))
    assert reader.read().step == 4
    write_events(tmp_path / "a-run", attempt_events(1, start=0, last=9, total_steps=30))
    assert reader.read().step == 9


def test_addresses_of_one_folder_are_equal(tmp_path: Path) -> None:
    """All spellings of a folder have the same canonical address."""
    spellings = ["runs", "./runs/", str(tmp_path / "runs"), (tmp_path / "runs").as_uri(), "other/../runs"]
    assert {canonical(spelling, tmp_path) for spelling in spellings} == {str(tmp_path / "runs")}
    assert canonical("gs://bucket/runs/", tmp_path) == "gs://bucket/runs"
    assert folder_of("s3://bucket/runs") is None


@pytest.mark.parametrize(
    "uri", ["gss://bucket/runs", "gs:/bucket/runs", "gs://", "gcs://bucket", "https://host/bucket"]
)
def test_a_malformed_address_is_not_taken_for_a_folder(uri: str, tmp_path: Path) -> None:
    """It is refused with BucketError."""
    with pytest.raises(BucketError):
        canonical(uri, tmp_path)

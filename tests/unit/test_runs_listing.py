"""`runs` lists a bucket; a run is found by its name or address."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.registry import submitted
from launcher.registry.find import RunPlace, place
from launcher.registry.submitted import Sent
from launcher.runs import listing as listing_module
from launcher.runs.listing import SILENT_S, listing
from tests.fakes.journeys import LEGS, journey, write_journey
from tests.fakes.runs import BEGIN, attempt_events, write_commit, write_events
from trainer.bucket import open_run
from trainer.errors import UserError

NOW = BEGIN.timestamp() + 100


def test_a_row_for_each_run_the_latest_first(tmp_path: Path) -> None:
    """State, step, loss, dollars, last activity."""
    write_journey(tmp_path / "clouds", journey())
    write_events(tmp_path / "plain", attempt_events(1, start=0, last=14, total_steps=40))
    rows = listing(str(tmp_path), now=NOW)
    assert [row.run for row in rows] == ["clouds", "plain"]
    clouds, plain = rows
    assert (clouds.state, clouds.step, clouds.total_steps, clouds.attempts) == ("done", 478, 478, len(LEGS))
    assert clouds.usd == pytest.approx(21.855, abs=0.001)
    assert (plain.state, plain.step, plain.committed, plain.usd) == ("running", 14, 10, None)
    assert plain.loss == 1 / 14 + 1


def test_a_run_that_fell_silent_is_told_from_one_at_work(tmp_path: Path) -> None:
    """The bucket alone cannot know more."""
    write_events(tmp_path / "plain", attempt_events(1, start=0, last=14, total_steps=40))
    assert [row.state for row in listing(str(tmp_path), now=NOW + SILENT_S)] == ["silent"]


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    """It is listed with what is wrong with it."""
    write_events(tmp_path / "good", attempt_events(1, start=0, last=4, total_steps=40))
    (tmp_path / "bad" / "events").mkdir(parents=True)
    (tmp_path / "bad" / "events" / "0001.jsonl").write_text("{broken\n")
    rows = {row.run: row for row in listing(str(tmp_path), now=NOW)}
    assert rows["good"].error is None
    assert "cannot be read" in (rows["bad"].error or "")


def test_folders_that_are_no_runs_are_left_out(tmp_path: Path) -> None:
    """What else lies beside the runs is nobody's business."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert listing(str(tmp_path), now=NOW) == []


def test_runs_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for all others to have begun, which one after the other would wait for ever."""
    for number in range(8):
        write_events(tmp_path / f"run-{number}", attempt_events(1, start=0, last=2, total_steps=4))
    together = threading.Barrier(8, timeout=30)

    class Waits(listing_module.Reader):
        def read(self) -> listing_module.Run:
            together.wait()
            return super().read()

    monkeypatch.setattr(listing_module, "Reader", Waits)
    assert len(listing(str(tmp_path), now=NOW)) == 8


def test_a_bucket_is_listed_like_a_folder(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON for programs, as a table for people."""
    bucket = open_run(s3, "there")
    lines = [json.dumps(event) for event in attempt_events(1, start=0, last=4, total_steps=40)]
    bucket.put("events/0001.jsonl", "\n".join(lines).encode())
    with pytest.raises(SystemExit):
        main(["runs", "--checkpoints", s3, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["step"], row["state"]) == ("there", 4, "silent")
    with pytest.raises(SystemExit):
        main(["runs", "--checkpoints", s3])
    assert "4 of 40" in capsys.readouterr().out


# Which run is meant


def submit(state: Path, checkpoints: str) -> None:
    facts = {"run_id": "a-run", "recipe": "r", "checkpoints": checkpoints, "kind": "cluster", "name": "a-run"}
    more = {"job_id": 1, "where": "gcp", "usd_per_h": None, "submitted": 0.0}
    submitted.remember(state, Sent.model_validate({**facts, **more}))


def found(run: str, checkpoints: str | None, root: Path) -> RunPlace:
    environ = {"AEOLUS_CHECKPOINTS": "s3://settings/runs"}
    return place(run, checkpoints, state=root / "state", environ=environ, cwd=root)


def test_a_run_is_named_by_its_id_or_its_address(tmp_path: Path) -> None:
    """An address has its folder in it; an option goes before everything; the settings are the last resort."""
    assert found("s3://b/p/a-run", None, tmp_path) == RunPlace("s3://b/p", "a-run")
    assert found("runs/a-run", None, tmp_path) == RunPlace(str(tmp_path / "runs"), "a-run")
    assert found("a-run", "s3://b/p/", tmp_path) == RunPlace("s3://b/p", "a-run")
    assert found("a-run", None, tmp_path) == RunPlace("s3://settings/runs", "a-run")


def test_a_run_is_where_it_was_submitted_to(tmp_path: Path) -> None:
    """And one name in two places is asked after."""
    submit(tmp_path / "state", "gs://one")
    assert found("a-run", None, tmp_path) == RunPlace("gs://one", "a-run")
    submit(tmp_path / "state", "gs://two")
    with pytest.raises(UserError, match="2 runs are called a-run"):
        found("a-run", None, tmp_path)


def test_a_run_that_is_nowhere_is_said_so(tmp_path: Path) -> None:
    """With the command that lists what there is."""
    with pytest.raises(UserError, match="nothing of a run a-run") as caught:
        RunPlace(str(tmp_path), "a-run").read()
    assert "launcher runs" in (caught.value.hint or "")


def test_a_run_with_a_commit_and_no_events_is_one(tmp_path: Path) -> None:
    """Its first attempt died before it could tell anything else."""
    write_commit(tmp_path / "a-run", "step-00000010")
    assert RunPlace(str(tmp_path), "a-run").read().commits == (10,)

"""`runs` lists the runs of a bucket, and `place` finds a run by its name or address."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.registry import submitted
from launcher.registry.find import RunPlace, place
from launcher.registry.submitted import StartedRun
from launcher.runs import listing as listing_module
from launcher.runs.listing import SILENT_S, listing
from tests.fakes.journeys import LEGS, journey, write_journey
from tests.fakes.runs import BEGIN, attempt_events, write_commit, write_events
from trainer.bucket import open_run
from trainer.errors import UserError

NOW = BEGIN.timestamp() + 100


def test_runs_are_listed_latest_first(tmp_path: Path) -> None:
    """A row has state, step, loss, commits, attempts and dollars."""
    write_journey(tmp_path / "clouds", journey())
    write_events(tmp_path / "plain", attempt_events(1, start=0, last=14, total_steps=40))
    rows = listing(str(tmp_path), now=NOW)
    assert [row.run for row in rows] == ["clouds", "plain"]
    clouds, plain = rows
    assert (clouds.state, clouds.step, clouds.total_steps, clouds.attempts) == ("done", 478, 478, len(LEGS))
    assert clouds.usd == pytest.approx(21.855, abs=0.001)
    assert (plain.state, plain.step, plain.committed, plain.usd) == ("running", 14, 10, None)
    assert plain.loss == 1 / 14 + 1


def test_a_run_without_recent_events_is_silent(tmp_path: Path) -> None:
    """The bucket alone cannot tell whether its machine is lost."""
    write_events(tmp_path / "plain", attempt_events(1, start=0, last=14, total_steps=40))
    assert [row.state for row in listing(str(tmp_path), now=NOW + SILENT_S)] == ["silent"]


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    """A damaged run has a row with its error."""
    write_events(tmp_path / "good", attempt_events(1, start=0, last=4, total_steps=40))
    (tmp_path / "bad" / "events").mkdir(parents=True)
    (tmp_path / "bad" / "events" / "0001.jsonl").write_text("{broken\n")
    rows = {row.run: row for row in listing(str(tmp_path), now=NOW)}
    assert rows["good"].error is None
    assert "cannot be read" in (rows["bad"].error or "")


def test_other_folders_are_left_out(tmp_path: Path) -> None:
    """A folder without events and commits is not a run."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    assert listing(str(tmp_path), now=NOW) == []


def test_runs_are_read_concurrently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits until all reads have started, so sequential reads would time out."""
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
    """`runs` prints JSON or a table."""
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
    submitted.remember(state, StartedRun.model_validate({**facts, **more}))


def found(run: str, checkpoints: str | None, root: Path) -> RunPlace:
    environ = {"AEOLUS_CHECKPOINTS": "s3://settings/runs"}
    return place(run, checkpoints, state=root / "state", environ=environ, cwd=root)


def test_a_run_is_named_by_its_id_or_its_address(tmp_path: Path) -> None:
    """An address names its folder or bucket. For an id, `--checkpoints` comes first and the settings last."""
    assert found("s3://b/p/a-run", None, tmp_path) == RunPlace("s3://b/p", "a-run")
    assert found("runs/a-run", None, tmp_path) == RunPlace(str(tmp_path / "runs"), "a-run")
    assert found("a-run", "s3://b/p/", tmp_path) == RunPlace("s3://b/p", "a-run")
    assert found("a-run", None, tmp_path) == RunPlace("s3://settings/runs", "a-run")


def test_a_submitted_run_is_found_where_it_was_submitted_to(tmp_path: Path) -> None:
    """A name that exists in two places is refused."""
    submit(tmp_path / "state", "gs://one")
    assert found("a-run", None, tmp_path) == RunPlace("gs://one", "a-run")
    submit(tmp_path / "state", "gs://two")
    with pytest.raises(UserError, match="2 runs are called a-run"):
        found("a-run", None, tmp_path)


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    """The hint names the command that lists all runs."""
    with pytest.raises(UserError, match="has no run a-run") as caught:
        RunPlace(str(tmp_path), "a-run").read()
    assert "launcher runs" in (caught.value.hint or "")


def test_a_run_with_a_commit_and_no_events_is_one(tmp_path: Path) -> None:
    """Events may be missing if the first attempt was lost early."""
    write_commit(tmp_path / "a-run", "step-00000010")
    assert RunPlace(str(tmp_path), "a-run").read().commits == (10,)

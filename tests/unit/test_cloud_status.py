"""`status` shows local runs, managed jobs and clusters in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cloud.fake import FakeCloud
from launcher.cloud.protocol import JobStatus, Kind, Phase
from launcher.registry import submitted
from launcher.registry.find import find
from launcher.registry.submitted import StartedRun
from launcher.runs.run import Reader
from launcher.submit.status import table, usd_so_far
from tests.fakes.runs import BEGIN, attempt_events, write_commit, write_events
from trainer.bucket import open_run
from trainer.errors import Unavailable, UserError

BEGAN = BEGIN.timestamp()


class Site:
    def __init__(self, root: Path) -> None:
        self.state = root / "state"
        self.runs = root / "runs"
        self.cloud = FakeCloud()

    def send(self, run: str = "a-run", kind: Kind = "managed job", **given: Any) -> StartedRun:
        some = {
            "run_id": run,
            "recipe": "r",
            "checkpoints": str(self.runs),
            "kind": kind,
            "name": run,
            "job_id": 3,
            "where": "A100:8 spot on gcp",
            "usd_per_h": 36.0,
            "submitted": BEGAN,
        }
        sent = StartedRun.model_validate({**some, **given})
        submitted.remember(self.state, sent)
        return sent

    def stands(self, phase: Phase, run: str = "a-run", kind: Kind = "managed job", **given: Any) -> None:
        some = {"kind": kind, "name": run, "job_id": 3, "phase": phase, "raw_status": phase.upper()}
        self.cloud.statuses[kind, run] = JobStatus.model_validate({**some, "where": "gcp/us-east4", **given})

    def train(self, run: str = "a-run", *, done: bool = False, **given: Any) -> None:
        write_events(self.runs / run, attempt_events(1, start=0, last=97, total_steps=200, **given))
        write_commit(self.runs / run, "step-00000090")
        if done:
            write_commit(self.runs / run, "final")

    def rows(self, **given: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in table(self.state, self.cloud, now=BEGAN + 3600, **given)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_row_has_it_all(site: Site) -> None:
    """The row has all columns."""
    site.send()
    site.stands("running")
    site.train()
    assert site.rows() == [
        {
            "run": "a-run",
            "kind": "managed job",
            "where": "managed job 3: gcp/us-east4",
            "state": "running",
            "step": 97,
            "committed": 90,
            "attempts": 1,
            "usd": 36.0,
            "recipe": "r",
            "checkpoints": str(site.runs),
            "pid": None,
            "said": "RUNNING",
            "error": None,
        }
    ]


@pytest.mark.parametrize("phase", ["waiting", "running", "recovering", "stopping", "failed", "cancelled"])
def test_the_state_is_skypilot_s(site: Site, phase: Phase) -> None:
    """Until the run ends, the state is SkyPilot's phase."""
    site.send()
    site.stands(phase)
    site.train()
    assert site.rows()[0]["state"] == phase


def test_done_is_the_bucket_s_to_say(site: Site) -> None:
    """A committed final model means done, whatever phase SkyPilot reports."""
    site.send()
    site.stands("failed")
    site.train(done=True)
    assert site.rows()[0]["state"] == "done"


def test_a_cluster_that_is_gone_leaves_its_run_preempted(site: Site) -> None:
    """An attempt without an end was lost with its machine."""
    site.send(kind="cluster")
    site.train()
    (row,) = site.rows()
    assert (row["state"], row["where"]) == ("preempted", "cluster: A100:8 spot on gcp")


def test_skypilot_is_asked_of_what_may_be_at_work_only(site: Site) -> None:
    """SkyPilot is not asked without submissions, and only once about an ended job."""
    assert site.rows() == []
    assert site.cloud.asked == []
    site.send()
    site.stands("cancelled")
    site.train()
    site.rows()
    assert site.cloud.asked == ["managed jobs"]
    (row,) = site.rows()
    assert site.cloud.asked == ["managed jobs"]
    assert (row["state"], row["where"]) == ("preempted", "managed job 3: gcp/us-east4")


def test_a_cluster_without_work_is_still_asked_for(site: Site) -> None:
    """It costs money until it is gone."""
    site.send(kind="cluster")
    site.stands("done", kind="cluster")
    site.train(done=True)
    site.rows()
    site.rows()
    assert site.cloud.asked == ["clusters", "clusters"]


def test_all_asks_for_what_was_submitted_elsewhere(site: Site) -> None:
    """Jobs that were submitted elsewhere have a row with SkyPilot's facts."""
    site.stands("running", run="other")
    assert site.rows() == []
    (row,) = site.rows(everything=True)
    assert (row["run"], row["state"], row["step"]) == ("other", "running", None)


def test_a_server_that_is_down_hides_nothing(site: Site) -> None:
    """The row has the bucket's facts and the error."""
    site.send()
    site.train()
    site.cloud.fault = Unavailable("SkyPilot's API server does not answer")
    (row,) = site.rows()
    assert (row["state"], row["step"]) == ("running", 97)
    assert "does not answer" in row["error"]
    site.cloud.fault = None
    site.stands("running")
    assert site.rows()[0]["error"] is None


def test_a_bucket_out_of_reach_hides_nothing(site: Site) -> None:
    """The row has SkyPilot's facts and the error."""
    site.send(checkpoints="ftp://nowhere")
    site.stands("running")
    (row,) = site.rows()
    assert (row["state"], row["step"]) == ("running", None)
    assert "ftp://nowhere" in row["error"]


def test_dollars_are_the_attempts_hours_at_the_chosen_price(site: Site) -> None:
    """Time between attempts costs nothing. A running attempt counts until now."""
    write_events(
        site.runs / "a-run",
        attempt_events(1, start=0, last=9, total_steps=200),
        attempt_events(2, start=0, last=9, total_steps=200, began=BEGIN.replace(hour=2)),
    )
    run = Reader(open_run(str(site.runs), "a-run"), "a-run").read()
    seconds = sum(1 for event in run.attempts[0].events) - 1
    left = usd_so_far(run, 36.0, now=BEGAN + 3 * 3600, at_work=False)
    assert left == pytest.approx(2 * 36.0 * seconds / 3600, abs=0.01)
    at_work = usd_so_far(run, 36.0, now=BEGAN + 3 * 3600, at_work=True)
    assert at_work == pytest.approx(36.0 * (1 + seconds / 3600), abs=0.01)
    assert usd_so_far(run, None, now=BEGAN, at_work=True) is None


def test_the_latest_comes_first_and_a_damaged_record_is_left_out(site: Site) -> None:
    """An unreadable record is skipped."""
    site.send("old", submitted=BEGAN)
    site.send("new", submitted=BEGAN + 5)
    (site.state / submitted.FOLDER / "broken.json").write_text("{}")
    assert [row["run"] for row in site.rows()] == ["new", "old"]


def test_a_run_is_found_by_its_name(site: Site) -> None:
    """A name in two buckets is ambiguous; an unknown name is an error with the known names."""
    site.send()
    assert find(site.state, "a-run", None).run_id == "a-run"
    site.send(checkpoints="gs://other")
    with pytest.raises(UserError, match="2 runs are called a-run"):
        find(site.state, "a-run", None)
    assert find(site.state, "a-run", "gs://other").checkpoints == "gs://other"
    with pytest.raises(UserError, match="known runs: a-run"):
        find(site.state, "nobody", None)

"""`watch`: the state of a run, its view, and that the run is only read."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from launcher.cloud.fake import FakeCloud
from launcher.cloud.protocol import JobStatus, Phase
from launcher.local.process import Home, LocalRecord
from launcher.registry import submitted as submissions
from launcher.registry.find import RunPlace
from launcher.registry.submitted import StartedRun
from launcher.watch import follow
from launcher.watch.braille import MARGIN, BrailleCurve, plot
from launcher.watch.state import ASK_EVERY_S, RunSnapshot, Source
from launcher.watch.view import RunView, line
from tests.fakes.journeys import BEGIN, LEGS, PLAN, Leg, journey, write_journey
from tests.fakes.runs import attempt_events, write_events
from tests.harness import ROOT, wait_until
from tests.servers.s3 import FaultyS3
from trainer.bucket import open_run
from trainer.errors import Unavailable

RUNNING = (LEGS[0], Leg("gcp/us-east5", "spot", 13.18, 268, None, gap_s=540))


class Site:
    """A run over two machines, the second of which is running. `now` is the time of its last event."""

    def __init__(self, root: Path) -> None:
        self.runs, self.state = root / "runs", root / "state"
        self.cloud = FakeCloud()
        self.attempts = journey(RUNNING)
        self.now = datetime.fromisoformat(self.attempts[-1][-1]["time"]).timestamp()
        write_journey(self.runs / "a-run", self.attempts)

    def submitted(self, phase: Phase = "running") -> None:
        facts = {
            "run_id": "a-run",
            "recipe": "r",
            "checkpoints": str(self.runs),
            "kind": "managed job",
            "name": "a-run",
        }
        more = {"job_id": 3, "where": "gcp", "usd_per_h": 13.18, "submitted": BEGIN.timestamp()}
        submissions.remember(self.state, StartedRun.model_validate({**facts, **more}))
        status = {
            "kind": "managed job",
            "name": "a-run",
            "job_id": 3,
            "phase": phase,
            "raw_status": phase.upper(),
        }
        self.cloud.statuses["managed job", "a-run"] = JobStatus.model_validate(status)

    def source(self) -> Source:
        return Source(RunPlace(str(self.runs), "a-run"), self.cloud, state=self.state)

    def look(self, after_s: float = 0.0) -> RunSnapshot:
        return self.source().look(self.now + after_s)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def drawn(seen: RunSnapshot, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(RunView(seen, rows=30))
    return captured.get()


def test_the_view_shows_progress_cost_and_attempts(site: Site) -> None:
    """It has progress, time left, node, price, dollars, plan, age of the last commit, and the attempts."""
    text = drawn(site.look(after_s=30))
    for words in (
        "step 268 of 478", "56%", "left", "gcp/us-east5, spot, 13.18 $/h", "so far", "$41.00 planned", "at the end",
        "step 250", "ago, 18 steps since", "tokens/s", "GPU memory", "peak 70 GiB, 74 predicted, 79 available",
        "loss", "reward accuracy", "lost", "running", "gcp/us-central1",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("rows", [14, 24, 50])
@pytest.mark.parametrize("width", [80, 160])
def test_the_view_fits_the_height(site: Site, width: int, rows: int) -> None:
    """The curves shrink, so that the rows below them are always visible."""
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(RunView(site.look(), hint="q leaves", rows=rows))
    printed = captured.get().rstrip().splitlines()
    assert printed[-1].strip() == "q leaves"
    assert len(printed) <= rows


def test_the_view_shows_the_share_of_the_budget(site: Site) -> None:
    """The budget comes from the claim."""
    for events in site.attempts:
        events[0]["limits"] = {"budget_usd": 20.0, "deadline_h": None}
    write_journey(site.runs / "a-run", site.attempts)
    assert "55% of the budget of $20.00" in drawn(site.look())


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_view_fits_the_width(site: Site, width: int) -> None:
    """No line is wider than the terminal."""
    assert all(len(row) <= width for row in drawn(site.look(), width).splitlines())


def test_dollars_grow_while_the_machine_runs(site: Site) -> None:
    """They grow without new events, and stop when SkyPilot reports the end of the machine."""
    site.submitted("running")
    early, late = site.look(), site.look(after_s=3600)
    assert early.account.usd is not None
    assert late.account.usd == pytest.approx(early.account.usd + 13.18)
    site.submitted("failed")
    assert site.look(after_s=3600).account.usd == pytest.approx(early.account.usd)


@pytest.mark.parametrize(
    ("phase", "state", "at_work"),
    [
        ("running", "running", True),
        ("recovering", "recovering", True),
        ("failed", "failed", False),
        ("waiting", "waiting", True),
    ],
)
def test_skypilot_s_phase_is_the_state_before_the_end(
    site: Site, phase: Phase, state: str, at_work: bool
) -> None:
    """A managed job in recovery counts as at work, although its newest attempt is lost."""
    site.submitted(phase)
    seen = site.look(after_s=7200)
    assert (seen.state, seen.at_work, seen.over) == (state, at_work, not at_work)


def test_a_run_without_recovery_is_over(site: Site) -> None:
    """Its job has ended, so after a while no recovery is expected."""
    site.submitted("idle")
    assert not site.look(after_s=10).over
    assert site.look(after_s=100).over


def test_skypilot_is_asked_rarely(site: Site) -> None:
    """The bucket is read every time, SkyPilot only every `ASK_EVERY_S`, because its answers take seconds."""
    site.submitted()
    source = site.source()
    for after_s in (0.0, 5.0, ASK_EVERY_S - 1, ASK_EVERY_S):
        source.look(site.now + after_s)
    assert site.cloud.asked == ["managed jobs"] * 2


def test_the_run_is_shown_while_skypilot_is_unreachable(site: Site) -> None:
    """The facts come from the bucket, and the view names the fault."""
    site.submitted()
    site.cloud.fault = Unavailable("no API server")
    seen = site.look()
    assert (seen.state, seen.at_work, seen.fault) == ("running", True, "no API server")
    assert "incomplete: no API server" in drawn(seen)


def test_a_recovery_on_this_machine_is_followed(site: Site) -> None:
    """A recovery is a new process, which the next read of the record finds."""
    home = Home.of(site.state, "a-run", str(site.runs))
    home.path.mkdir(parents=True)
    ours = psutil.Process()
    record = LocalRecord(
        run_id="a-run",
        recipe="r",
        checkpoints=str(site.runs),
        pid=ours.pid,
        created=ours.create_time() - 3600,
    )
    home.remember(record)
    source = site.source()
    assert not source.look(site.now).at_work
    home.remember(record.model_copy(update={"created": ours.create_time()}))
    seen = source.look(site.now)
    assert (seen.state, seen.at_work) == ("running", True)


def test_a_silent_run_from_elsewhere_is_not_running(site: Site) -> None:
    """This machine cannot check it, so the age of the last event decides."""
    assert site.look(after_s=60).at_work
    silent = site.look(after_s=3600)
    assert (silent.state, silent.at_work, silent.over) == ("preempted", False, False)
    assert "no event since" in drawn(silent)


def test_a_run_without_attempts_can_be_watched(tmp_path: Path) -> None:
    """It may still wait for its first machine."""
    seen = Source(RunPlace(str(tmp_path), "new"), FakeCloud(), state=tmp_path / "state").look(0.0)
    assert "no events yet" in drawn(seen)
    assert "no events yet" in line(seen)


def test_only_files_that_grew_are_read_again(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """The events of the first of two attempts are read once."""
    bucket = open_run(s3, "a-run")

    def put(events: list[dict[str, Any]]) -> None:
        bucket.put(
            f"events/{events[0]['attempt']:04d}.jsonl",
            "".join(json.dumps(each) + "\n" for each in events).encode(),
        )

    put(attempt_events(1, start=0, last=14, total_steps=40))
    put(attempt_events(2, start=10, last=20, total_steps=40))
    source = Source(RunPlace(s3, "a-run"), FakeCloud(), state=tmp_path)
    source.look(0.0)
    read = [seen.key for seen in faulty_s3.requests if seen.method == "GET" and seen.key.endswith(".jsonl")]
    assert len(read) == 2
    before = len(faulty_s3.requests)
    source.look(1.0)
    assert [seen for seen in faulty_s3.requests[before:] if seen.key.endswith(".jsonl")] == []
    put(attempt_events(2, start=10, last=30, total_steps=40))
    before = len(faulty_s3.requests)
    assert source.look(2.0).run.step == 30
    assert [seen.key[-10:] for seen in faulty_s3.requests[before:] if seen.key.endswith(".jsonl")] == [
        "0002.jsonl"
    ]


# Curves of dots


def test_a_curve_goes_from_corner_to_corner() -> None:
    """A rising curve starts at the lower left and ends at the upper right."""
    rows = [
        row.plain
        for row in plot(
            [BrailleCurve([(0, 0.0), (10, 1.0)], "cyan")], width=MARGIN + 10, height=6, last_step=10
        )
    ]
    assert rows[0].endswith("⠊") or rows[0].rstrip()[-1] > "⠀"
    assert rows[-2][MARGIN] > "⠀"
    assert rows[0].lstrip().startswith("1 ")
    assert rows[-2].lstrip().startswith("0 ")
    assert rows[-1].split() == ["0", "10"]


@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [1.0], [2.0, 2.0, 2.0], [1.0, float("nan"), 3.0]])
def test_strange_curves_are_plotted(values: list[float]) -> None:
    """The rows have the requested size for any values."""
    rows = plot(
        [BrailleCurve(list(enumerate(values)), "cyan"), BrailleCurve([], "red", "o")],
        width=30,
        height=5,
        last_step=2,
        ends=[1],
    )
    assert len(rows) == 5
    assert all(len(row.plain) == 30 for row in rows)


# Following


class Pressed:
    """A fake source of keys, which are pressed one after the other."""

    def __init__(self, *keys: str) -> None:
        self._keys = list(keys)

    def wait(self, seconds: float) -> str:
        return self._keys.pop(0) if self._keys else ""


def test_a_line_is_printed_when_something_changes(site: Site) -> None:
    """Equal lines are printed once, until the run is over."""
    source, moments = site.source(), iter(range(100))

    def look(now: float) -> RunSnapshot:
        if now == 2:
            write_journey(
                site.runs / "a-run", journey((*RUNNING, Leg("nebius/eu-north1", "spot", 11.84, 478, "done")))
            )
        return source.look(site.now + now)

    console = Console(width=200)
    with console.capture() as captured:
        seen = follow.lines(look, console, Pressed(), every_s=0, clock=lambda: float(next(moments)))
    printed = captured.get().splitlines()
    assert seen.state == "done"
    assert printed[0].startswith("running  attempt 2 running  step 268 of 478")
    assert printed[-1].startswith("done  attempt 3 done  step 478 of 478")


def test_q_leaves(site: Site) -> None:
    """`live` returns the last snapshot."""
    source = site.source()
    terminal = Console(force_terminal=True, file=io.StringIO())
    seen = follow.live(
        lambda _now: source.look(site.now), terminal, Pressed("", "x", "q"), every_s=100, clock=time.monotonic
    )
    assert seen.run.step == 268


# The command


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path / "xdg"),
        "TERM": "xterm-256color",
        "PYTHONPATH": str(ROOT),
    }


def typed(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def test_watch_prints_json(site: Site, environment: dict[str, str]) -> None:
    """The object has the state and the account."""
    done = typed(["watch", str(site.runs / "a-run"), "--json"], environment)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["run"], printed["state"], printed["step"], printed["plan"]) == (
        "a-run",
        "preempted",
        268,
        PLAN,
    )
    assert len(printed["attempts"]) == 2


def test_an_unknown_name_is_refused(site: Site, environment: dict[str, str]) -> None:
    """If neither the bucket nor this machine knows the run, `watch` does not wait for it."""
    command = [sys.executable, "-m", "launcher", "watch", str(site.runs / "no-run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no run no-run" in done.stderr


def test_a_finished_run_is_shown_once(site: Site, environment: dict[str, str]) -> None:
    """`watch` prints one line and exits."""
    write_journey(site.runs / "a-run", journey())
    done = typed(["watch", str(site.runs / "a-run")], environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "done  attempt 4 done  step 478 of 478  loss 0.4812  committed 478  $21.86"
    ]


@pytest.fixture
def at_work(tmp_path: Path) -> Path:
    """A run whose last event is recent."""
    events = attempt_events(1, start=0, last=30, total_steps=400, began=datetime.now(UTC))
    write_events(tmp_path / "runs" / "live", events)
    return tmp_path / "runs" / "live"


def test_watch_draws_on_a_terminal_and_q_leaves(at_work: Path, environment: dict[str, str]) -> None:
    """The files of the run do not change."""
    before = {path: path.read_bytes() for path in at_work.rglob("*.jsonl")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "watch", str(at_work)], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )  # fmt: skip
    os.close(theirs)
    shown = b""

    def drawn() -> bool:
        nonlocal shown
        shown += os.read(ours, 65536)
        return b"the run continues" in shown

    try:
        wait_until(drawn, "watch to draw", timeout_s=60)
        os.write(ours, b"q")
        while process.poll() is None:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b"step 30 of 400" in shown
    assert {path: path.read_bytes() for path in at_work.rglob("*.jsonl")} == before

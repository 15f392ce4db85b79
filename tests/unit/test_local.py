"""Runs on this machine, with a supervisor that only pretends to train."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from launcher.cloud.local import LocalMachine
from launcher.cloud.protocol import LaunchRequest, Say, find
from launcher.local import process
from launcher.local.fault_injection import Preemptions, plan
from launcher.local.process import Home, LocalRecord, supervisor_command, supervisor_environment
from launcher.local.progress import PlainView, facts
from launcher.runs.run import Reader, RunHistory
from launcher.submit.follow import SubmitContext
from launcher.submit.launch import submit
from launcher.submit.outcome import MAX_FRUITLESS, Ending
from launcher.submit.prepare import Submission
from launcher.terminal import Answer
from tests.fakes import trainer_program
from trainer.bucket import open_run

POLL_S = 0.02


class Site:
    """A state folder, a folder of runs, and the launcher's output."""

    def __init__(self, root: Path) -> None:
        self.state = root / "state"
        self.runs = root / "runs"
        self.said = io.StringIO()
        self.home = Home.of(self.state, "a-run", str(self.runs))

    def job(self, **options: object) -> Submission:
        words = [f"{key}={value}" for key, value in options.items()]
        _, _, _, *rest = supervisor_command("fake", words, checkpoints=str(self.runs), run_id="a-run")
        launch = LaunchRequest(
            kind="local",
            name=self.home.path.name,
            run_id="a-run",
            recipe="fake",
            checkpoints=str(self.runs),
            task={
                "run": (sys.executable, trainer_program.__file__, *rest),
                "envs": supervisor_environment(os.environ),
            },
        )
        return Submission(launch=launch, where="this machine")

    def submit(
        self,
        job: Submission,
        *,
        view: PlainView | None = None,
        detach: bool = False,
        machine: LocalMachine | None = None,
        **given: Any,
    ) -> tuple[Ending, RunHistory]:
        machine = machine or LocalMachine(self.state)
        context = SubmitContext(
            backend=machine,
            state=self.state,
            view=view or PlainView(Console(file=self.said, width=400)),
            poll_s=POLL_S,
            kill=machine.kill,
            **given,
        )
        return submit(job, context, detach=detach)

    def follow(self, job: Submission, view: PlainView, **given: Any) -> Ending:
        return self.submit(job, view=view, **given)[0]

    def read(self) -> RunHistory:
        return Reader(open_run(str(self.runs), "a-run"), "a-run").read()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    if left := process.attach(site.home):
        left.lose()


class Interrupts(PlainView):
    """Sends signals to the launcher once the run has reached a step."""

    def __init__(self, site: Site, at_step: int, numbers: list[signal.Signals]) -> None:
        super().__init__(Console(file=site.said, width=400))
        self.at_step = at_step
        self.numbers = numbers

    def show(self, run: RunHistory) -> None:
        if self.numbers and run.step >= self.at_step:
            os.kill(os.getpid(), self.numbers.pop(0))


class Kills(PlainView):
    """Kills each attempt's supervisor at its step, without the launcher's knowledge."""

    def __init__(self, site: Site, steps: list[int]) -> None:
        super().__init__(Console(file=site.said, width=400))
        self.site = site
        self.steps = steps
        self.killed = 0

    def show(self, run: RunHistory) -> None:
        record = self.site.home.record()
        turn = self.killed
        if (
            record
            and turn < len(self.steps)
            and (len(run.attempts), run.step) == (turn + 1, self.steps[turn])
        ):
            self.killed += 1
            os.kill(record.pid, signal.SIGKILL)


def test_a_run_is_brought_to_its_end(site: Site) -> None:
    """The launcher shows the log until the run is done."""
    ending, run = site.submit(site.job())
    assert (ending.how, ending.exit_code) == ("done", 0)
    assert (run.state, run.step, run.commits) == ("done", 20, (5, 10, 15, 20))
    assert "step 20/20" in site.said.getvalue()


def test_a_done_run_is_left_as_it_is(site: Site) -> None:
    """The same submission starts nothing and names the final model."""
    site.submit(site.job())
    ending, run = site.submit(site.job())
    assert (ending.how, len(run.attempts)) == ("done", 1)
    assert "is done since" in ending.message
    assert f"{run.uri}/final" in ending.message


@pytest.mark.parametrize("times", [1, 3])
def test_preemptions_happen_and_are_counted(site: Site, times: int) -> None:
    """N preemptions give N killed attempts and one that finishes."""
    spots = plan(after=0, total_steps=20, times=times, seed=7)
    stalls = ",".join(str(spot.step) for spot in spots)
    ending, run = site.submit(site.job(stall=stalls), preemptions=Preemptions(times=times, seed=7))
    assert (ending.how, ending.preempted) == ("done", times)
    assert (run.preemptions, len(run.attempts)) == (times, times + 1)
    assert [attempt.step for attempt in run.attempts[:-1]] == [spot.step for spot in spots]
    assert [attempt.end for attempt in run.attempts[:-1]] == [None] * times


def test_an_attempt_that_begins_before_the_first_look_is_preempted(site: Site) -> None:
    """The supervisor may claim its attempt before the launcher reads the bucket again."""
    (moment,) = plan(after=0, total_steps=20, times=1, seed=3)

    class Slow(LocalMachine):
        def launch(self, request: LaunchRequest, say: Say) -> int:
            pid = super().launch(request, say)
            while site.read().step < moment.step:
                pass
            return pid

    preemptions = Preemptions(times=1, seed=3)
    job = site.job(stall=moment.step)
    ending, run = site.submit(job, machine=Slow(site.state), preemptions=preemptions)
    assert (ending.how, ending.preempted, len(run.attempts)) == ("done", 1, 2)


def test_a_preemption_that_comes_too_late_is_not_counted(site: Site) -> None:
    """A training of one step has no step to preempt at."""
    preemptions = Preemptions(times=2)
    ending, run = site.submit(site.job(steps=1), preemptions=preemptions)
    assert (ending.how, ending.preempted, preemptions.missed, len(run.attempts)) == ("done", 0, 2, 1)


def test_a_preemption_takes_the_whole_process_group(site: Site) -> None:
    """The supervisor and its descendants are killed, and `lose` returns whether it was running."""
    script = "import subprocess, sys; subprocess.run(['sleep', '600'], start_new_session=True)"
    command = [sys.executable, "-c", script]
    supervisor = process.start(
        site.home, command, os.environ, run_id="a-run", recipe="fake", checkpoints=str(site.runs)
    )
    while not (children := psutil.Process(supervisor.pid).children()):
        pass
    assert supervisor.lose()
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not supervisor.lose()


def test_a_lost_supervisor_is_recovered(site: Site) -> None:
    """A supervisor killed by another program is started again from the newest commit."""
    ending = site.follow(site.job(stall="12"), Kills(site, [12]))
    assert (ending.how, ending.preempted) == ("done", 0)
    assert [(attempt.start, attempt.step) for attempt in site.read().attempts] == [(0, 12), (10, 20)]
    assert "killed by SIGKILL" in site.said.getvalue()


def test_recoveries_without_a_new_commit_end(site: Site) -> None:
    """The launcher gives up after three recoveries in a row without a commit."""
    ending, run = site.submit(site.job(die_at=3))
    assert (ending.how, ending.exit_code) == ("gave up", 1)
    assert len(run.attempts) == 1 + MAX_FRUITLESS


def test_recoveries_with_new_commits_go_on(site: Site) -> None:
    """Recoveries that make progress do not count."""
    stalls = [6, 6, 6, 11, 11, 11, 16]
    killer = Kills(site, stalls)
    ending = site.follow(site.job(stall=",".join(map(str, stalls)), steps=18), killer)
    assert (ending.how, killer.killed) == ("done", len(stalls))


@pytest.mark.parametrize("code", [2, 78])
def test_a_refused_recipe_is_not_recovered(site: Site, code: int) -> None:
    """A refused recipe ends the submission with its message and exit code 2."""
    ending, run = site.submit(site.job(exit=code))
    assert (ending.how, ending.exit_code, len(run.attempts)) == ("refused", 2, 1)
    assert "the fake was told to fail" in ending.message


def test_a_newer_attempt_is_left_alone(site: Site) -> None:
    """A superseded supervisor is not restarted."""
    ending, run = site.submit(site.job(exit=77))
    assert (ending.how, len(run.attempts)) == ("superseded", 1)
    assert "a newer attempt" in ending.message


def test_a_bug_is_exit_code_1(site: Site) -> None:
    """An unexpected exit code is a failure, and the message has the reason."""
    ending, run = site.submit(site.job(exit=1))
    assert (ending.how, ending.exit_code, len(run.attempts)) == ("failed", 1, 1)
    assert "the fake was told to fail" in ending.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_a_signal_cancels(site: Site, number: signal.Signals) -> None:
    """The supervisor receives SIGTERM, commits and ends, and is not restarted."""
    ending = site.follow(site.job(stall="7"), Interrupts(site, 7, [number]))
    run = site.read()
    assert (ending.how, ending.exit_code) == ("cancelled", 75)
    assert (run.state, run.commits, len(run.attempts)) == ("preempted", (5, 7), 1)
    assert "resumes from step 7" in ending.message
    assert process.attach(site.home) is None


def test_a_cancelled_run_goes_on_when_submitted_again(site: Site) -> None:
    """The same command resumes from the checkpoint that was saved on cancelling."""
    site.follow(site.job(stall="7"), Interrupts(site, 7, [signal.SIGTERM]))
    ending, run = site.submit(site.job(stall="7"))
    assert (ending.how, run.attempts[-1].start, run.lost_steps) == ("done", 7, 0)


def detach() -> Answer:
    return "detach"


def second_interrupt() -> Answer:
    raise KeyboardInterrupt


def test_a_user_who_detaches_leaves_it_running(site: Site) -> None:
    """The answer `detach` leaves the supervisor running."""
    ending = site.follow(site.job(stall="7"), Interrupts(site, 7, [signal.SIGINT]), ask=detach)
    left = process.attach(site.home)
    assert left
    assert (ending.how, ending.exit_code) == ("detached", 0)
    assert str(left.pid) in ending.message
    assert str(site.home.log) in ending.message
    assert f"`launcher cancel {site.job().launch.run_id}` stops it" in ending.message


def test_ctrl_c_while_asking_cancels(site: Site) -> None:
    """A second Ctrl-C, during the question, cancels."""
    ending = site.follow(site.job(stall="7"), Interrupts(site, 7, [signal.SIGINT]), ask=second_interrupt)
    assert ending.how == "cancelled"


def test_a_run_that_is_lost_while_the_user_cancels_is_not_recovered(site: Site) -> None:
    """The supervisor is killed during the question. The answer `cancel` still counts."""
    machine = LocalMachine(site.state)

    def cancel_too_late() -> Answer:
        status = find(machine, site.home.path.name, "local")
        assert status
        assert machine.kill(status)
        return "cancel"

    view = Interrupts(site, 7, [signal.SIGINT])
    ending = site.follow(site.job(stall="7"), view, ask=cancel_too_late, machine=machine)
    assert (ending.how, ending.exit_code) == ("cancelled", 75)
    assert len(site.read().attempts) == 1


def test_a_user_who_continues_loses_nothing(site: Site) -> None:
    """The run continues, and a later answer still counts."""
    answers: list[Answer] = ["continue", "cancel"]
    view = Interrupts(site, 7, [signal.SIGINT, signal.SIGINT])
    ending = site.follow(site.job(stall="7"), view, ask=lambda: answers.pop(0))
    assert (ending.how, answers) == ("cancelled", [])


def test_detach_comes_back_at_once_and_leaves_it_running(site: Site) -> None:
    """A detached run continues. The same submission follows it and starts nothing."""
    site.submit(site.job(stall="7"), detach=True)
    first = process.attach(site.home)
    ending = site.follow(site.job(stall="7"), Interrupts(site, 7, [signal.SIGTERM]))
    assert first
    assert f"is already running, as pid {first.pid}" in site.said.getvalue()
    assert (ending.how, len(site.read().attempts)) == ("cancelled", 1)


def test_a_run_followed_again_can_be_preempted_and_recovered(site: Site) -> None:
    """A supervisor that another launcher started is treated like a child."""
    (spot,) = plan(after=0, total_steps=20, times=1, seed=3)
    job = site.job(stall=spot.step)
    site.submit(job, detach=True)
    ending, run = site.submit(job, preemptions=Preemptions(times=1, seed=3))
    assert (ending.how, ending.preempted, len(run.attempts)) == ("done", 1, 2)


def test_cancelled_from_elsewhere_is_not_recovered(site: Site) -> None:
    """A launcher stops following a run that another terminal has cancelled."""

    class CancelsElsewhere(PlainView):
        def show(self, run: RunHistory) -> None:
            elsewhere = LocalMachine(site.state)
            found = find(elsewhere, site.home.path.name, "local")
            if run.step >= 7 and found and found.phase == "running":
                elsewhere.cancel(found, str)

    ending = site.follow(site.job(stall="7"), CancelsElsewhere(Console(file=site.said, width=400)))
    assert (ending.how, len(site.read().attempts)) == ("cancelled", 1)


def test_a_recycled_pid_is_not_the_supervisor(site: Site) -> None:
    """A process with another start time than the record's is not the supervisor."""
    me = psutil.Process()
    record = LocalRecord(
        run_id="a-run", recipe="fake", checkpoints="", pid=me.pid, created=me.create_time() - 3600
    )
    assert record.process() is None
    assert record.model_copy(update={"created": me.create_time()}).process() == me


def test_the_pid_file_holds_no_secret(site: Site) -> None:
    """Overrides and environment may contain tokens, so neither is written."""
    job = site.job(hub_token="hf_secret")
    task = {**job.launch.task, "envs": {**job.launch.task["envs"], "T": "hf_secret"}}
    site.submit(replace(job, launch=replace(job.launch, task=task)))
    files = [path for path in site.home.path.iterdir() if path.is_file()]
    assert files
    assert not any("hf_secret" in path.read_text() for path in files)
    assert "hf_secret" not in repr(job)


def test_the_log_of_an_ended_run_is_printed_whole(site: Site) -> None:
    """Following an ended run's log prints all of it and returns."""
    site.submit(site.job(steps=3))
    lines: list[str] = []
    machine = LocalMachine(site.state)
    ended = find(machine, site.home.path.name)
    assert ended
    machine.logs(ended, lines.append, follow=True)
    assert lines == ["step 1/3", "step 2/3", "step 3/3"]


def test_the_live_line_tells_how_far_the_run_is(site: Site) -> None:
    """The text behind the bar has the loss, the accuracy and the newest commit."""
    ask: Callable[[], Answer] = detach
    _, run = site.submit(site.job(), ask=ask)
    assert facts(run).endswith("loss 0.0500  accuracy 0.50  committed 20")
    assert facts(RunHistory("a-run", "/runs/a-run", (), ())) == "starting"

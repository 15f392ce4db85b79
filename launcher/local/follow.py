"""Follows a run on this machine through its attempts: shows, preempts on request, recovers, cancels."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from launcher.local import process
from launcher.local.fault_injection import KillMoment, Preemptions
from launcher.local.process import LogTail, Supervisor
from launcher.local.progress import ProgressView
from launcher.local.signals import Signals
from launcher.registry.local import Home
from launcher.runs.run import AttemptHistory, Reader, RunHistory
from launcher.terminal import Answer
from trainer.accounting import Limits
from trainer.bucket.address import folder_of
from trainer.errors import ExitCode, UserError

MAX_FRUITLESS = 3
"""Recoveries in a row without a new commit, after which it is no accident."""
REATTACH_LINES = 10
"""Lines of the log that somebody who comes back is shown."""

How = Literal["done", "detached", "cancelled", "stopped", "superseded", "refused", "gave up", "failed"]
EXIT_CODES: dict[How, int] = {
    "done": ExitCode.DONE,
    "detached": ExitCode.DONE,
    "cancelled": ExitCode.RECOVER,
    "stopped": ExitCode.LIMIT,
    "refused": ExitCode.USAGE,
    "gave up": ExitCode.BUG,
    "superseded": ExitCode.BUG,
    "failed": ExitCode.BUG,
}


@dataclass(frozen=True)
class Submission:
    """What is to run: the same run id in the same bucket is the same run."""

    run_id: str
    recipe: str
    checkpoints: str
    """Canonical address of the folder of runs (`runs.canonical`)."""
    command: tuple[str, ...] = field(repr=False)
    """The supervisor's; its overrides and environment may hold tokens."""
    environment: Mapping[str, str] = field(repr=False)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class FollowOptions:
    """How the user wants a run to be followed."""

    preemptions: Preemptions = field(default_factory=Preemptions)
    detach: bool = False
    """Come back as soon as it is started."""
    ask: Callable[[], Answer] | None = None
    """What a Ctrl-C asks; without it, Ctrl-C cancels."""
    poll_s: float | None = None
    """Seconds between two looks at the bucket; None: by the kind of bucket."""


@dataclass(frozen=True)
class Ending:
    """Why the launcher stopped following a run."""

    how: How
    message: str
    preempted: int = 0
    """Preemptions on request that were done."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.how]


class Follower:
    """Follows a run through its attempts until it ends or the user leaves it."""

    def __init__(
        self,
        job: Submission,
        home: Home,
        reader: Reader,
        view: ProgressView,
        signals: Signals,
        wishes: FollowOptions,
    ) -> None:
        self._job = job
        self._home = home
        self._reader = reader
        self._view = view
        self._signals = signals
        self._preemptions = wishes.preemptions
        self._ask = wishes.ask
        self._poll_s = wishes.poll_s or (2.0 if folder_of(job.checkpoints) is None else 0.3)
        self._fruitless = 0
        self._newest_commit = 0
        self.run = reader.read()
        """As last seen."""

    def begin(self) -> Supervisor:
        """The run's supervisor: the one that is at work here already, or a new one."""
        with self._home.locked():
            if found := process.attach(self._home):
                self._log = LogTail(self._home.log, last_lines=REATTACH_LINES)
                mine = bool(self.run.attempts) and self.run.attempts[-1].began >= found.created
                self._known_attempt = self._newest_attempt() - mine
                self._view.note(
                    f"run {self._job.run_id} is at work here already (pid {found.pid}): following it"
                )
                return found
            self._home.set_cancelled(False)
            self._log = LogTail(self._home.log)
            return self._start()

    def follow(self, supervisor: Supervisor) -> Ending:
        """Until the run is done, refused, failed or cancelled, or the user leaves it."""
        self._newest_commit = max(self.run.commits, default=0)
        while True:
            preempted_before = len(self._preemptions.steps)
            if self._watch(supervisor) == "detach":
                supervisor.leave()
                return self._left(supervisor)
            self._look()
            code = supervisor.exit_code()
            how = judge(
                _told_code(self._current()) if code is None else code,
                self.run,
                cancelled=self._home.cancelled,
            )
            if how != "recover":
                return self._ended(how)
            ours = len(self._preemptions.steps) > preempted_before
            if not ours and not self._may_recover():
                return self._ended("gave up")
            if not ours:
                self._view.note(f"the supervisor ended ({_meaning(code)}): starting it again")
            supervisor = self._start()

    def _start(self) -> Supervisor:
        self._known_attempt = self._newest_attempt()
        job = self._job
        return process.start(
            self._home, job.command, job.environment,
            run_id=job.run_id, recipe=job.recipe, checkpoints=job.checkpoints,
        )  # fmt: skip

    def _watch(self, supervisor: Supervisor) -> Answer:
        """Until it ends, unless the user leaves before that ("detach")."""
        while supervisor.alive():
            self._look()
            answer = self._wish()
            if answer == "detach":
                return "detach"
            if answer == "cancel":
                cancel(self._home, supervisor)
                self._view.note(
                    "cancelling: it saves, uploads and commits first (Ctrl-C: do not wait for that)"
                )
            attempt = self._current()
            spot = self._preemptions.due(attempt, self.run.total_steps) if attempt else None
            if attempt and spot and not self._home.cancelled:
                self._preempt(supervisor, attempt, spot)
            else:
                self._signals.wait(self._poll_s)
        return "continue"

    def _look(self) -> None:
        """Show what is new."""
        for line in self._log.new_lines():
            self._view.line(line)
        try:
            self.run = self._reader.read()
        except UserError as error:  # training does not need us to see it; the next look may
            self._view.note(f"cannot see the run for now: {error.message}")
        self._view.show(self.run)

    def _wish(self) -> Answer:
        number = self._signals.take()
        if number is None:
            return "continue"
        if self._home.cancelled:
            return "detach"  # the second time: they do not want to wait
        if number == signal.SIGTERM or self._ask is None:
            return "cancel"
        with self._view.paused(), self._signals.raising():
            try:
                return self._ask()
            except KeyboardInterrupt:
                return "cancel"

    def _preempt(self, supervisor: Supervisor, attempt: AttemptHistory, spot: KillMoment) -> None:
        if self._signals.wait(spot.delay * attempt.step_s) or not supervisor.lose():
            return
        self._look()
        if self.run.state == "done":  # it had just committed its last byte
            return
        self._preemptions.happened(max(attempt.step, self.run.step))
        count = f"{len(self._preemptions.steps)} of {len(self._preemptions.steps) + self._preemptions.missed}"
        self._view.note(f"preemption {count}: killed at step {self._preemptions.steps[-1]}; recovering")

    def _may_recover(self) -> bool:
        newest = max(self.run.commits, default=0)
        self._fruitless = 1 if newest > self._newest_commit else self._fruitless + 1
        self._newest_commit = max(newest, self._newest_commit)
        return self._fruitless <= MAX_FRUITLESS

    def _newest_attempt(self) -> int:
        return self.run.attempts[-1].number if self.run.attempts else 0

    def _current(self) -> AttemptHistory | None:
        """The attempt of the supervisor that we follow, once it has claimed one."""
        return self.run.attempts[-1] if self._newest_attempt() > self._known_attempt else None

    def _left(self, supervisor: Supervisor) -> Ending:
        if self._home.cancelled:
            message = f"not waiting: pid {supervisor.pid} saves and ends by itself; log: {self._home.log}"
            return Ending("cancelled", message, len(self._preemptions.steps))
        return Ending("detached", detached_text(supervisor, self._home), len(self._preemptions.steps))

    def _ended(self, how: How) -> Ending:
        attempt = self._current()
        told = attempt.end.get("message", "") if attempt and attempt.end else ""
        commit = max(self.run.commits, default=None)
        place = "from the beginning: nothing was committed yet" if commit is None else f"from step {commit}"
        messages: dict[How, str] = {
            "done": "done",
            "cancelled": f"cancelled; the same command goes on {place}",
            "stopped": stopped_text(self._job.run_id, told),
            "superseded": "a newer attempt, on another machine or in another terminal, owns the run now; nothing to do here",
            "refused": f"the run cannot start like this: {told or f'see above, or {self._home.log}'}",
            "gave up": f"gave up after {MAX_FRUITLESS} recoveries in a row without a new commit; log: {self._home.log}\n"
            f"  once the cause is gone, the same command goes on {place}",
            "failed": f"the trainer failed: {told or 'it left no message'}; log: {self._home.log}",
        }
        return Ending(how, messages[how], len(self._preemptions.steps))


def judge(code: int, run: RunHistory, *, cancelled: bool) -> How | Literal["recover"]:
    """What the supervisor's exit code (negative: a signal) means for the run."""
    if code == ExitCode.DONE or run.state == "done":
        return "done"
    if code in (ExitCode.USAGE, ExitCode.CONFIG):
        return "refused"
    if code == ExitCode.LIMIT:
        return "stopped"
    if code == ExitCode.SUPERSEDED:
        return "superseded"
    if code == ExitCode.RECOVER or code < 0:
        return "cancelled" if cancelled else "recover"
    return "failed"


def cancel(home: Home, supervisor: Supervisor) -> None:
    """Have it save, upload, commit and end; whoever follows it will not recover it."""
    home.set_cancelled(True)
    supervisor.terminate()


def detached_text(supervisor: Supervisor, home: Home) -> str:
    """What somebody who leaves needs to come back."""
    record = home.record()
    run = record.run_id if record else "RUN"
    return (
        f"training goes on by itself: pid {supervisor.pid}, log {home.log}\n"
        f"  the same command follows it again, and so does `launcher watch {run}`; `launcher cancel {run}` stops it"
    )


def stopped_text(run_id: str, why: str) -> str:
    """What a run's user reads when it has stopped for its budget or deadline."""
    return f"{why}\n  `launcher submit --resume {run_id} --budget N`, or `--deadline`, with more goes on"


def _told_code(attempt: AttemptHistory | None) -> int:
    """The exit code of a supervisor that was not our child, as its attempt's last event tells it."""
    end = attempt.end if attempt else None
    if end is None:
        return -signal.SIGKILL  # it could tell nobody
    codes = {
        "done": ExitCode.DONE,
        "superseded": ExitCode.SUPERSEDED,
        "preempted": ExitCode.RECOVER,
        "stopped": ExitCode.LIMIT,
    }
    return int(end.get("exit_code", ExitCode.BUG)) if end["kind"] == "failed" else codes[end["kind"]]


def _meaning(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "preempted, or the infrastructure failed"

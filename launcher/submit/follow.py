"""Follow a job to its end: show its log, ask on Ctrl-C, restart a lost local job, and judge the outcome."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.cloud.protocol import Cloud, JobStatus, Say, find
from launcher.image import builders
from launcher.image.builders import BuildOptions
from launcher.local.fault_injection import KillMoment, Preemptions
from launcher.local.progress import ProgressView
from launcher.runs.run import AttemptHistory, Reader, RunHistory
from launcher.submit.outcome import MAX_FRUITLESS, Ending, How, detached_text, judge, outcome_text
from launcher.submit.prepare import Submission
from launcher.terminal import Answer, Signals
from trainer.bucket.address import folder_of
from trainer.errors import UserError
from trainer.events import Event

POLL_S = 5.0
"""Pause between two looks at a managed job that waits for a machine; SkyPilot's controller looks every 20 s."""
REATTACH_LINES = 20
"""Lines of the log that are shown first when a running job is followed again."""
MAX_BREAKS = 5
"""Times in a row that SkyPilot's log stream may break off while the job is running."""
GRACE_S = 45.0
"""Wait after cancelling on a cluster: SkyPilot sends SIGTERM, and SIGKILL 30 s later
(`sky/skylet/subprocess_daemon.py`, 0.14.1)."""
GONE_S = 600.0
"""Longest wait for a managed job to be CANCELLED; until then its machine is being given back."""
CANCEL_POLL_S = 2.0


@dataclass(frozen=True)
class SubmitContext:
    """The surroundings of a submission: backend, records, terminal and clock."""

    backend: Cloud
    state: Path
    """Folder with the records of this machine's runs."""
    view: ProgressView
    build: Callable[[BuildOptions, Say], object] = builders.ensure
    """Builds a submission's image."""
    ask: Callable[[], Answer] | None = None
    """Asks the user what a Ctrl-C means. None: a local run is cancelled, any other is left running."""
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    poll_s: float | None = None
    """Seconds between two looks at the bucket of a local run; None: depends on the kind of bucket."""
    preemptions: Preemptions = field(default_factory=Preemptions)
    kill: Callable[[JobStatus], bool] | None = None
    """Kills a local job without notice, for `preemptions`; returns whether it was still running."""


class Follower:
    """Follows a run until it ends or the user leaves it."""

    def __init__(
        self,
        job: Submission,
        run: RunHistory,
        reader: Reader,
        context: SubmitContext,
        signals: Signals | None,
        *,
        relaunch: Callable[[], JobStatus],
    ) -> None:
        """Create the follower.

        Args:
            job: what was submitted.
            run: the run as it was before the job was launched, so that its attempts are told apart from the job's.
            reader: reads the run's bucket.
            context: backend, terminal and clock.
            signals: records Ctrl-C and SIGTERM, if the backend polls; else Ctrl-C raises KeyboardInterrupt.
            relaunch: starts the job again.
        """
        self._job = job
        self._reader = reader
        self._context = context
        self._backend = context.backend
        self._view = context.view
        self._signals = signals
        self._preemptions = context.preemptions
        self._relaunch = relaunch
        local_folder = folder_of(job.launch.checkpoints) is not None
        self._poll_s = context.poll_s or (0.3 if local_folder else 2.0)
        self._attempts_before = 0
        self._detached = False
        self._fruitless = 0
        self.run = run
        """The run as last read."""
        self._newest_commit = max(self.run.commits, default=0)

    def follow(self, status: JobStatus, *, came_back: bool) -> Ending:
        """Show the log until the run is done, refused, failed or cancelled, or the user leaves it.

        Args:
            status: the running job.
            came_back: whether the job was running before this command, so that its newest lines are shown first.
        """
        self._attempts_before = self._earlier_attempts(status) if came_back else len(self.run.attempts)
        tail = REATTACH_LINES if came_back else 0
        while True:
            self._status, preempted_before = status, len(self._preemptions.steps)
            try:
                ended = self._watch(status, tail)
            except KeyboardInterrupt:
                answer = self._context.ask() if self._context.ask else "detach"
                if answer == "continue":
                    tail = REATTACH_LINES
                    continue
                if answer == "detach":
                    return self._leave(status)
                cancel(status, self._backend, self._reader, self._view.note, sleep=self._context.sleep)
                ended = find(self._backend, status.name, status.kind)
            if self._detached:
                return self._leave(ended or status)
            self._read_at_end()
            if ended and ended.at_work:
                text = f"the log breaks off again and again; {detached_text(ended, self.run.run_id)}"
                return self._ending("detached", text)
            how = judge(ended, self.run, attempts_before=self._attempts_before)
            if how != "recover":
                return self._ending(how, outcome_text(how, ended, self.run, end=self._end()))
            # Only a local job is recovered here: SkyPilot recovers managed jobs by itself.
            on_request = len(self._preemptions.steps) > preempted_before
            if not on_request and not self._may_recover():
                return self._ending("gave up", outcome_text("gave up", ended, self.run, end=None))
            if not on_request:
                self._view.note(f"the supervisor ended ({_meaning(ended)}): starting it again")
            self._attempts_before = len(self.run.attempts)
            status = self._relaunch()

    def _watch(self, status: JobStatus, tail: int) -> JobStatus | None:
        """Show the log until the job ends; return its status then, or None if its cluster is gone."""
        now: JobStatus | None = status
        breaks = 0
        while now and now.at_work and breaks < MAX_BREAKS and not self._detached:
            now = self._wait_for_machine(now)
            if now and now.at_work:
                self._backend.logs(now, self._view.line, follow=True, tail=tail, poll=self._poll)
                # SkyPilot's stream also ends where a machine is lost; then the log is taken up again.
                now, tail, breaks = find(self._backend, now.name, now.kind), 1, breaks + 1
                if now and now.at_work and not self._detached:
                    self._context.sleep(POLL_S)
        return now

    def _wait_for_machine(self, status: JobStatus) -> JobStatus | None:
        """While a managed job waits for its machine, show the places that its controller tries."""
        now: JobStatus | None = status
        shown = 0
        while now and now.kind == "managed job" and now.phase == "waiting":
            lines = self._backend.tried(now)
            for line in lines[shown:]:
                self._view.note(line)
            shown = max(shown, len(lines))
            self._context.sleep(POLL_S)
            now = find(self._backend, now.name, now.kind)
        return now

    def _poll(self) -> bool:
        """Look at the run, handle signals and preemptions, then pause; return whether the user leaves."""
        self._read()
        answer = self._answer()
        if answer == "detach":
            self._detached = True
            return True
        if answer == "cancel":
            self._backend.cancel(self._status, self._view.note)
            self._view.note("cancelling: it saves, uploads and commits first (Ctrl-C: do not wait for that)")
        attempt = self._current()
        moment = self._preemptions.due(attempt, self.run.total_steps) if attempt else None
        if attempt and moment and not self._cancelling():
            self._preempt(attempt, moment)
        else:
            self._pause(self._poll_s)
        return False

    def _pause(self, seconds: float) -> bool:
        """Wait; return whether a signal has ended the wait."""
        if self._signals:
            return self._signals.wait(seconds)
        self._context.sleep(seconds)
        return False

    def _read(self) -> None:
        try:
            self.run = self._reader.read()
        except UserError as error:  # the training does not depend on this; the next look may succeed
            self._view.note(f"cannot read the run at the moment: {error.message}")
        self._view.show(self.run)

    def _read_at_end(self) -> None:
        """Read the final state. Only a local job's outcome is known without it, by its exit code."""
        if self._backend.polls:
            self._read()
        else:
            self.run = self._reader.read()

    def _answer(self) -> Answer:
        """Return what the user wants, if a signal has arrived."""
        number = self._signals.take() if self._signals else None
        if number is None or self._signals is None:
            return "continue"
        if self._cancelling():
            return "detach"  # the second signal: the user does not want to wait
        if number == signal.SIGTERM or self._context.ask is None:
            return "cancel"
        with self._view.paused(), self._signals.raising():
            try:
                return self._context.ask()
            except KeyboardInterrupt:
                return "cancel"

    def _cancelling(self) -> bool:
        """Return whether the job was cancelled, here or from another terminal."""
        now = find(self._backend, self._status.name, self._status.kind)
        return now is not None and now.phase in ("stopping", "cancelled")

    def _preempt(self, attempt: AttemptHistory, moment: KillMoment) -> None:
        if self._pause(moment.delay * attempt.step_s):
            return
        if self._context.kill is None or not self._context.kill(self._status):
            return
        self._read()
        if self.run.state == "done":  # it had just committed its last checkpoint
            return
        self._preemptions.happened(max(attempt.step, self.run.step))
        count = f"{len(self._preemptions.steps)} of {len(self._preemptions.steps) + self._preemptions.missed}"
        self._view.note(f"preemption {count}: killed at step {self._preemptions.steps[-1]}; recovering")

    def _may_recover(self) -> bool:
        newest = max(self.run.commits, default=0)
        self._fruitless = 1 if newest > self._newest_commit else self._fruitless + 1
        self._newest_commit = max(newest, self._newest_commit)
        return self._fruitless <= MAX_FRUITLESS

    def _earlier_attempts(self, status: JobStatus) -> int:
        """Return the number of attempts that are not this job's; SkyPilot's jobs may have made them all."""
        if status.kind != "local" or status.since is None:
            return 0
        return sum(attempt.began < status.since for attempt in self.run.attempts)

    def _current(self) -> AttemptHistory | None:
        """Return the attempt of the job that is followed, once it has claimed one."""
        return self.run.attempts[-1] if len(self.run.attempts) > self._attempts_before else None

    def _end(self) -> Event | None:
        attempt = self._current()
        return attempt.end if attempt else None

    def _leave(self, status: JobStatus) -> Ending:
        if status.kind == "local" and status.phase in ("stopping", "cancelled"):
            text = f"not waiting: pid {status.job_id} saves and ends by itself; log: {status.log_path}"
            return self._ending("cancelled", text)
        return self._ending("detached", detached_text(status, self._job.launch.run_id))

    def _ending(self, how: How, message: str) -> Ending:
        return Ending(how, message, len(self._preemptions.steps))


def cancel(
    status: JobStatus,
    backend: Cloud,
    reader: Reader,
    say: Say,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> RunHistory:
    """Cancel SkyPilot's job and wait until the run has saved its work; return the run as it is then.

    Raises:
        UserError: the backend refuses, or the bucket cannot be read.
    """
    backend.cancel(status, say)
    until = clock() + (GRACE_S if status.kind == "cluster" else GONE_S)
    while not _over(status, backend, reader.read()) and clock() < until:
        sleep(CANCEL_POLL_S)
    return reader.read()


def cancel_local(status: JobStatus, backend: Cloud, say: Say) -> None:
    """Cancel a local job and show its log until it ends. This does not need the bucket, which may be out of reach."""
    backend.cancel(status, say)
    backend.logs(status, say, follow=True)


def _over(status: JobStatus, backend: Cloud, run: RunHistory) -> bool:
    """Return whether the attempt has recorded its end; for a managed job also whether the job has ended."""
    if status.kind == "cluster":
        return not run.attempts or run.attempts[-1].end is not None
    now = find(backend, status.name, status.kind)
    return now is None or not now.at_work


def _meaning(status: JobStatus | None) -> str:
    code = status.exit_code if status else None
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "preempted, or the infrastructure failed"

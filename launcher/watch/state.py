"""The state of a watched run, from its bucket's events and from SkyPilot or this machine's processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.cloud.local import WHERE
from launcher.cloud.protocol import Cloud, JobStatus
from launcher.registry.find import RunPlace, place_of, started_runs, status_of
from launcher.registry.submitted import StartedRun
from launcher.runs.account import Account, account
from launcher.runs.listing import SILENT_S
from launcher.runs.run import RunHistory
from launcher.submit import status
from trainer.errors import UserError

ASK_EVERY_S = 20.0
"""Seconds between two queries of SkyPilot, which take seconds each; the bucket answers everything else."""
RECOVERY_S = 60.0
"""Seconds without an event after which a run that is not running is not waiting for a recovery any more."""
OVER = ("done", "failed", "superseded", "stopped", "cancelled")
"""States that no recovery follows."""
ELSEWHERE = "started elsewhere"


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment."""

    run: RunHistory
    account: Account
    state: str
    """`running`, `done`, `recovering` …: the end comes from the bucket, everything before it from SkyPilot."""
    at_work: bool
    """Whether the run is running, or is being started or recovered."""
    held_by: str
    """What runs it, such as `this machine, pid 17` or `managed job 3, RUNNING`."""
    now: float
    """Unix time, seconds."""
    known: bool = False
    """Whether it was started from this machine, which then knows whether it is still running."""
    fault: str | None = None
    """What could not be read this time."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen without the user."""
        abandoned = self.known and self.silent_s > RECOVERY_S
        return not self.at_work and (self.state in OVER or abandoned)

    @property
    def silent_s(self) -> float:
        """Seconds since the latest event."""
        return max(0.0, self.now - self.run.attempts[-1].ended) if self.run.attempts else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds to the last step at the pace of the newest attempt, its evaluations and saves included."""
        run = self.run
        if not self.at_work or not run.attempts or not run.total_steps or not run.attempts[-1].step_s:
            return None
        return run.attempts[-1].step_s * (run.total_steps - run.step)


class Source:
    """Reads a run repeatedly: from the bucket only what has grown, from SkyPilot every `ASK_EVERY_S`."""

    def __init__(self, place: RunPlace, cloud: Cloud | None, *, state: Path) -> None:
        self._reader = place.reader()
        self._cloud = cloud
        self._state_folder = state
        self._known = next((record for record in started_runs(state) if place_of(record) == place), None)
        self._status: JobStatus | None = None
        self._asked_at = -ASK_EVERY_S
        self._fault: str | None = None

    def look(self, now: float) -> RunSnapshot:
        """Return the run as it is now; raises BucketError and Unavailable."""
        run = self._reader.read()
        state, at_work, held_by = self._state(run, now)
        until = now if at_work and run.state == "running" else None
        return RunSnapshot(
            run, account(run, now=until), state, at_work, held_by, now, self._known is not None, self._fault
        )

    def _state(self, run: RunHistory, now: float) -> tuple[str, bool, str]:
        """Return the state, whether the run is at work, and what runs it."""
        record = self._known
        if record is None:
            silent = not run.attempts or now - run.attempts[-1].ended > SILENT_S
            if run.state == "running" and not silent:
                return "running", True, ELSEWHERE
            return status.stopped(run), False, ELSEWHERE
        if record.kind == "local":
            job = status_of(record, self._state_folder)  # a recovery is a new process
            if job and job.at_work and run.state != "done":
                return "running", True, f"{WHERE}, {job.raw_status}"
            return status.stopped(run), False, WHERE
        return self._submitted(record, run, now)

    def _submitted(self, record: StartedRun, run: RunHistory, now: float) -> tuple[str, bool, str]:
        if not record.over and now - self._asked_at >= ASK_EVERY_S:
            self._asked_at = now
            try:
                self._status, self._fault = status_of(record, self._state_folder, self._cloud), None
            except UserError as error:  # the bucket's events can still be shown
                self._fault = error.message
        job = self._status
        state = status.state_of(job, run, unsure=self._fault is not None)
        held_by = status.job_text(record) + (f", {job.raw_status}" if job else "")
        # Without an answer from SkyPilot, the bucket decides.
        at_work = run.state != "done" and (
            job.at_work if job else self._fault is not None and run.state == "running"
        )
        return state, at_work, held_by

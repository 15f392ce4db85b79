"""What is known of a run that is watched: its bucket's events, and how SkyPilot or this machine says that it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.cloud.protocol import Cloud, JobStatus, find
from launcher.registry import known
from launcher.registry.find import RunPlace
from launcher.registry.known import Local, Submitted
from launcher.runs.account import Account, account
from launcher.runs.listing import SILENT_S
from launcher.runs.run import RunHistory
from launcher.submit import status
from trainer.errors import UserError

ASK_EVERY_S = 20.0
"""Seconds between two questions to SkyPilot, which answers in seconds; the bucket knows all else."""
RECOVERY_S = 60.0
"""Whoever recovers a run has begun after so long."""
OVER = ("done", "failed", "superseded", "stopped", "cancelled")


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment."""

    run: RunHistory
    account: Account
    state: str
    """`running`, `done`, `recovering` …: the bucket knows of the end, SkyPilot of the way there."""
    at_work: bool
    said: str
    """By whom it is held, in a few words."""
    now: float
    """Unix time, seconds."""
    known: bool = False
    """Whether it was started from here, so that somebody can say whether it is still held."""
    fault: str | None = None
    """What could not be seen this time."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen by itself."""
        left = self.known and self.silent_s > RECOVERY_S
        return not self.at_work and (self.state in OVER or left)

    @property
    def silent_s(self) -> float:
        """Since its last event."""
        return max(0.0, self.now - self.run.attempts[-1].ended) if self.run.attempts else 0.0

    @property
    def left_s(self) -> float | None:
        """Until the last step, at the pace of the newest attempt, its evaluations and saves included."""
        run = self.run
        if not self.at_work or not run.attempts or not run.total_steps or not run.attempts[-1].step_s:
            return None
        return run.attempts[-1].step_s * (run.total_steps - run.step)


class Source:
    """Looks again and again: of the bucket it reads what has grown, of SkyPilot it asks now and then."""

    def __init__(self, place: RunPlace, cloud: Callable[[], Cloud], *, state: Path) -> None:
        self._reader = place.reader()
        self._cloud = cloud
        self._known = next(
            (
                each
                for each in known.known(state)
                if (each.record.run_id, each.record.checkpoints) == (place.run_id, place.checkpoints)
            ),
            None,
        )
        self._standing: JobStatus | None = None
        self._asked_at = -ASK_EVERY_S
        self._fault: str | None = None

    def look(self, now: float) -> RunSnapshot:
        """The run as it is; raises BucketError and Unavailable."""
        run = self._reader.read()
        state, at_work, said = self._stands(run, now)
        told = account(run, now=now if at_work and run.state == "running" else None)
        return RunSnapshot(run, told, state, at_work, said, now, self._known is not None, self._fault)

    def _stands(self, run: RunHistory, now: float) -> tuple[str, bool, str]:
        if isinstance(self._known, Local):
            record = self._known.home.record() or self._known.record  # each recovery is another process
            process = record.process()
            if process and run.state != "done":
                return "running", True, f"this machine, pid {process.pid}"
            return status.stopped(run), False, "this machine"
        if isinstance(self._known, Submitted):
            return self._submitted(self._known, run, now)
        silent = not run.attempts or now - run.attempts[-1].ended > SILENT_S
        if run.state == "running" and not silent:
            return "running", True, "started elsewhere"
        return status.stopped(run), False, "started elsewhere"

    def _submitted(self, known: Submitted, run: RunHistory, now: float) -> tuple[str, bool, str]:
        sent = known.record
        if not sent.over and now - self._asked_at >= ASK_EVERY_S:
            self._asked_at = now
            try:
                self._standing, self._fault = find(self._cloud(), sent.name, sent.kind), None
            except UserError as error:  # the bucket still tells of the run
                self._fault = error.message
        there = self._standing
        state = status.state_of(there, run, unsure=self._fault is not None)
        number = f" {sent.job_id}" if sent.kind == "managed job" and sent.job_id is not None else ""
        words = f"{sent.kind}{number}" + (f", {there.said}" if there else "")
        at_work = run.state != "done" and (
            there.at_work if there else self._fault is not None and run.state == "running"
        )
        return state, at_work, words

"""The outcome of a run: what it is, its exit code and its message, wherever the run was launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.cloud.protocol import JobStatus
from launcher.runs.run import RunHistory
from trainer.errors import ExitCode
from trainer.events import Event

MAX_FRUITLESS = 3
"""Recoveries in a row without a new commit. One more, and the launcher gives up."""
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
FINAL: dict[int, How] = {
    ExitCode.USAGE: "refused",
    ExitCode.CONFIG: "refused",
    ExitCode.LIMIT: "stopped",
    ExitCode.SUPERSEDED: "superseded",
}
"""Exit codes of the supervisor that decide the outcome by themselves."""


@dataclass(frozen=True)
class Ending:
    """Why the launcher stopped following a run."""

    how: How
    message: str
    preempted: int = 0
    """Preemptions on request that took place."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.how]


def judge(status: JobStatus | None, run: RunHistory, *, attempts_before: int = 0) -> How | Literal["recover"]:
    """Return the outcome of a job that is no longer running.

    Args:
        status: the job; None if its cluster is gone, so that only the run's bucket knows the outcome.
        run: the run as its bucket has it.
        attempts_before: attempts of earlier jobs. Their ends say nothing about this job, which may have had no machine.
    """
    end = run.attempts[-1].end if len(run.attempts) > attempts_before else None
    known = status.exit_code if status else None
    code = _exit_code(end) if known is None else known
    if run.state == "done" or known == ExitCode.DONE:
        return "done"
    if code in FINAL:
        return FINAL[code]
    if status and status.kind == "local":
        if code is not None and code >= 0 and code != ExitCode.RECOVER:
            return "failed"
        return "cancelled" if status.phase == "cancelled" else "recover"
    if status is None or status.phase in ("cancelled", "idle", "stopping"):
        return "cancelled"
    return "failed"


def outcome_text(how: How, status: JobStatus | None, run: RunHistory, *, end: Event | None) -> str:
    """Return the message for an outcome.

    Args:
        how: the outcome.
        status: the job; None if its cluster is gone.
        run: the run as its bucket has it.
        end: the last event of the job's attempt, if it has recorded its end.
    """
    reason = str(end.get("message", "")) if end else ""
    why = reason or (status.reason if status and status.reason else "") or "it left no message"
    commit = max(run.commits, default=None)
    place = "from the beginning: nothing was committed yet" if commit is None else f"from step {commit}"
    log = status.log_path if status and status.log_path else f"`launcher logs {run.run_id}`"
    job = status.raw_status if status else "gone"
    messages: dict[How, str] = {
        "done": f"done: {run.final_uri}",
        "cancelled": f"cancelled; the same command resumes {place}",
        "stopped": f"{why}\n  `launcher submit --resume {run.run_id} --budget N`, or `--deadline`, with more resumes it",
        "refused": f"the run cannot start like this: {why}; log: {log}",
        "superseded": "a newer attempt, started elsewhere, owns the run now; nothing to do here",
        "gave up": f"gave up after {MAX_FRUITLESS} recoveries in a row without a new commit; log: {log}\n"
        f"  once the cause is fixed, the same command resumes {place}",
        "failed": f"the job failed ({job}): {why}; log: {log}\n  the same command resumes {place}",
    }
    cluster = status is not None and status.kind == "cluster"
    rest = f"\n  its cluster is still up: `launcher down {run.run_id}` gives it back" if cluster else ""
    return messages[how] + rest


def detached_text(status: JobStatus, run_id: str) -> str:
    """Return how to find a run again that was left running."""
    return (
        f"training continues by itself: {status.describe()}\n"
        f"  the same command follows it again, and so does `launcher logs {run_id} -f`; "
        f"`launcher cancel {run_id}` stops it"
    )


def _exit_code(end: Event | None) -> int | None:
    """Return the supervisor's exit code by its attempt's last event; None if it was lost before it could write one."""
    if end is None:
        return None
    codes = {
        "done": ExitCode.DONE,
        "superseded": ExitCode.SUPERSEDED,
        "preempted": ExitCode.RECOVER,
        "stopped": ExitCode.LIMIT,
    }
    return int(end.get("exit_code", ExitCode.BUG)) if end["kind"] == "failed" else codes[end["kind"]]

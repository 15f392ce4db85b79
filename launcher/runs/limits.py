"""A run's limits as the launcher sees them: refused before anything is rented, and what a run at work keeps to."""

from __future__ import annotations

from datetime import datetime

from launcher.runs.run import RunHistory
from trainer.accounting import Limits, exhausted_limit
from trainer.errors import UserError
from trainer.events import of_kind


def refuse_used_up(run: RunHistory, limits: Limits, *, now: datetime) -> None:
    """Another attempt would be paid for nothing: it would stop as soon as it had begun.

    Raises:
        UserError: what is used up, and how to go on.
    """
    gone = exhausted_limit([attempt.events for attempt in run.attempts], limits, now)
    if gone is None:
        return
    raise UserError(
        f"run {run.run_id} has used up its {gone.what}: {gone}, in {len(run.attempts)} attempt"
        f"{'s' * (len(run.attempts) != 1)}; its newest commit is {_commit(run)}",
        hint=f"`launcher submit --resume {run.run_id} --{gone.what} N` with more goes on from there",
    )


def kept(run: RunHistory) -> Limits:
    """What the newest attempt keeps to, by its claim."""
    claims = of_kind(run.attempts[-1].events, "claimed") if run.attempts else []
    return Limits.model_validate((claims[-1].get("limits") if claims else None) or {})


def unchanged(run: RunHistory, limits: Limits) -> str | None:
    """What to say to who asks for other limits while the run is at work; None if they are the same."""
    if not run.attempts or kept(run) == limits:
        return None
    return (
        "a run at work keeps to the limits that it was started with:"
        f" `launcher cancel {run.run_id}`, and then the same command"
    )


def _commit(run: RunHistory) -> str:
    return f"step {max(run.commits)}" if run.commits else "none"

"""The runs of a bucket, one row each, read concurrently."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from launcher.runs.run import Reader, RunHistory
from trainer.bucket import list_runs, open_run
from trainer.errors import UserError

AT_ONCE = 32
"""Runs read at the same time; each needs a few small requests, which mostly wait."""
SILENT_S = 300.0
"""Seconds without an event after which a run without an end event counts as `silent`: its machine is probably lost."""


@dataclass(frozen=True)
class RunListing:
    """One run of a bucket."""

    run: str
    state: str
    """From its events; `silent` for a run without an end event and without any event in the last `SILENT_S`."""
    method: str
    step: int | None
    total_steps: int | None
    loss: float | None
    committed: int | None
    """Step of the newest committed checkpoint."""
    attempts: int | None
    usd: float | None
    last: float | None
    """Time of its latest event (unix time, seconds)."""
    error: str | None = None
    """Why it could not be read."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON output."""
        return asdict(self)


def listing(checkpoints: str, *, now: float) -> list[RunListing]:
    """Return every run below an address, the latest first; folders without a run are left out.

    Args:
        checkpoints: canonical address of the folder or bucket of the runs.
        now: unix time, seconds.

    Raises:
        BucketError, Unavailable: the bucket cannot be listed.
    """
    names = list_runs(checkpoints)
    with ThreadPoolExecutor(AT_ONCE) as readers:
        rows = list(readers.map(lambda name: _listed(checkpoints, name, now), names))
    return sorted((row for row in rows if row), key=lambda row: row.last or 0.0, reverse=True)


def _listed(checkpoints: str, run_id: str, now: float) -> RunListing | None:
    try:
        run = Reader(open_run(checkpoints, run_id), run_id).read()
    except (UserError, ValueError, KeyError) as error:  # a damaged run does not hide the others
        reason = error.message if isinstance(error, UserError) else f"its events cannot be read: {error}"
        return RunListing(run_id, "?", "", None, None, None, None, None, None, None, error=reason)
    return _row(run, now) if run.attempts or run.commits else None


def _row(run: RunHistory, now: float) -> RunListing:
    last = run.attempts[-1].ended if run.attempts else None
    silent = run.state == "running" and last is not None and now - last > SILENT_S
    return RunListing(
        run=run.run_id,
        state="silent" if silent else run.state,
        method=run.method,
        step=run.step,
        total_steps=run.total_steps,
        loss=run.steps[-1].get("loss") if run.steps else None,
        committed=max(run.commits, default=None),
        attempts=len(run.attempts),
        usd=run.cost(now=now if run.state == "running" and not silent else None).usd,
        last=last,
    )

"""The table of `status`: each run by its bucket and by the backend that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.cloud.protocol import Cloud, JobStatus, Kind
from launcher.registry import submitted
from launcher.registry.find import backend_of, place_of, started_runs
from launcher.registry.submitted import StartedRun
from launcher.runs.run import RunHistory
from trainer.errors import UserError

READERS = 8
"""Number of buckets that are read at once."""
RowDict = dict[str, str | int | float | None]


def table(state: Path, cloud: Cloud | None, *, now: float, everything: bool = False) -> list[RowDict]:
    """Return a row for each run, the latest first.

    SkyPilot is asked only about jobs that may still exist.

    Args:
        state: folder with this machine's records.
        cloud: a stand-in for SkyPilot.
        now: unix time, seconds.
        everything: whether to include SkyPilot's jobs that were not submitted from here.
    """
    records = started_runs(state)
    local, _ = _statuses(backend_of("local", state), [r for r in records if r.kind == "local"])
    open_ones = [record for record in records if record.kind != "local" and not record.over]
    statuses, fault = _statuses(backend_of("cluster", state, cloud), open_ones, everything=everything)
    with ThreadPoolExecutor(READERS) as readers:
        runs = list(readers.map(_read, records))
    rows = []
    for record, run in zip(records, runs, strict=True):
        found = local if record.kind == "local" else statuses
        status = found.pop((record.kind, record.name), None)
        if fault is None and record.kind != "local" and not record.over and _is_over(status):
            last_place = status.where if status and status.where else record.where
            submitted.remember(state, record.model_copy(update={"over": True, "where": last_place}))
        rows.append(_row(record, status, run, fault=fault if record.kind != "local" else None, now=now))
    return [*rows, *(_foreign_row(status) for status in statuses.values() if everything)]


def usd_so_far(run: RunHistory, usd_per_h: float | None, *, now: float, at_work: bool) -> float | None:
    """Return the cost of the attempts' hours, each at its own price, else at the planned price.

    The newest attempt counts until `now` if it is running.
    """
    usd = run.cost(now=now if at_work else None, usd_per_h=usd_per_h).usd
    return None if usd is None else round(usd, 2)


def state_of(status: JobStatus | None, run: RunHistory, *, unsure: bool) -> str:
    """Return the state of a run: its end by its bucket, until then by its backend.

    Args:
        status: the run's job; None if the backend has none, or was not asked.
        run: the run as its bucket has it.
        unsure: whether the backend could not be asked. Else an attempt without an end was lost with its machine.
    """
    if run.state == "done":
        return "done"
    if run.state == "stopped" and not (status and status.at_work):
        return "stopped"  # SkyPilot calls it failed
    if status and (status.at_work or status.kind != "local") and status.phase != "idle":
        return status.phase
    return run.state if unsure else stopped(run)


def stopped(run: RunHistory) -> str:
    """Return the state of a run that is not running."""
    return "preempted" if run.state == "running" else run.state


def job_text(record: StartedRun) -> str:
    """Return the job in words: `managed job 3`, `cluster`."""
    number = f" {record.job_id}" if record.kind == "managed job" and record.job_id is not None else ""
    return f"{record.kind}{number}"


def _statuses(
    backend: Cloud, records: Sequence[StartedRun], *, everything: bool = False
) -> tuple[dict[tuple[Kind, str], JobStatus], UserError | None]:
    """Return the jobs of these runs, or all jobs, and the error that cut the answer short."""
    found: dict[tuple[Kind, str], JobStatus] = {}
    jobs = [record.name for record in records if record.kind != "cluster"]
    clusters = [record.name for record in records if record.kind == "cluster"]
    try:
        if jobs or everything:
            found |= _keyed(backend.jobs(None if everything else jobs))
        if clusters or everything:
            found |= _keyed(backend.clusters(None if everything else clusters))
    except UserError as error:
        return found, error
    return found, None


def _keyed(statuses: Mapping[str, JobStatus]) -> dict[tuple[Kind, str], JobStatus]:
    return {(status.kind, name): status for name, status in statuses.items()}


def _read(record: StartedRun) -> RunHistory | UserError:
    try:
        return place_of(record).reader().read()
    except UserError as error:  # the bucket may be unreachable; the row has the message
        return error


def _is_over(status: JobStatus | None) -> bool:
    """Return whether SkyPilot need not be asked again. A cluster costs money until it is gone."""
    return status is None or (status.kind == "managed job" and not status.at_work)


def _row(
    record: StartedRun,
    status: JobStatus | None,
    run: RunHistory | UserError,
    *,
    fault: UserError | None,
    now: float,
) -> RowDict:
    local, at_work = record.kind == "local", status is not None and status.at_work
    where = status.where if status and status.where else record.where
    row: RowDict = {
        "run": record.run_id,
        "kind": record.kind,
        "where": where if local else f"{job_text(record)}: {where}",
        "state": "?",
        "step": None,
        "committed": None,
        "attempts": None,
        "usd": None,
        "recipe": record.recipe,
        "checkpoints": record.checkpoints,
        "pid": status.job_id if status and local and at_work else None,
        "said": status.raw_status if status and not local else None,
        "error": None,
    }
    if isinstance(run, UserError):
        state = status.phase if status and (at_work or not local) else "?"
        return {**row, "state": state, "error": run.message}
    return {
        **row,
        "state": state_of(status, run, unsure=fault is not None),
        "step": run.step,
        "committed": max(run.commits, default=None),
        "attempts": len(run.attempts),
        "usd": usd_so_far(run, record.usd_per_h, now=now, at_work=at_work),
        "error": fault.message if fault and not record.over else None,
    }


def _foreign_row(status: JobStatus) -> RowDict:
    """Return the row of a job that was not submitted from here, and may not be a run of this program."""
    where = f"{status.kind}: {status.where}" if status.where else status.kind
    unknown: Iterable[str] = (
        "step",
        "committed",
        "attempts",
        "usd",
        "recipe",
        "checkpoints",
        "pid",
        "error",
    )
    facts = {"run": status.name, "kind": status.kind, "where": where, "state": status.phase}
    return {**facts, **dict.fromkeys(unknown), "said": status.raw_status}

"""How the runs of this machine stand: local ones, managed jobs and clusters, by their buckets and by SkyPilot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.cloud.protocol import Cloud, JobStatus, Kind
from launcher.registry import submitted
from launcher.registry.known import Known, Local, Submitted, known
from launcher.registry.local import LocalRecord
from launcher.registry.submitted import Sent
from launcher.runs.run import Reader, RunHistory
from trainer.bucket import open_run
from trainer.errors import UserError

READERS = 8
"""Buckets that are read at once."""
RowDict = dict[str, str | int | float | None]


def table(state: Path, cloud: Cloud, *, now: float, everything: bool = False) -> list[RowDict]:
    """A row a run, the latest first. SkyPilot is asked only of what was submitted and is not known to be over.

    Args:
        state: this machine's.
        cloud: what is asked.
        now: unix time, seconds.
        everything: also what SkyPilot has that was not submitted from here.
    """
    runs = known(state)
    open_ones = [each.record for each in runs if isinstance(each, Submitted) and not each.record.over]
    standings, fault = _standings(cloud, open_ones, everything=everything)
    with ThreadPoolExecutor(READERS) as readers:
        seen = list(readers.map(_read, runs))
    rows = []
    for each, run in zip(runs, seen, strict=True):
        if isinstance(each, Local):
            rows.append(_local(each, run, now=now))
        else:
            standing = standings.pop((each.record.kind, each.record.name), None)
            if fault is None and not each.record.over and (standing is None or _gone(standing)):
                seen_at = standing.where if standing and standing.where else each.record.where
                submitted.remember(state, each.record.model_copy(update={"over": True, "where": seen_at}))
            rows.append(_submitted(each.record, standing, run, fault=fault, now=now))
    return [*rows, *(_unknown(standing) for standing in standings.values() if everything)]


def usd_so_far(run: RunHistory, usd_per_h: float | None, *, now: float, at_work: bool) -> float | None:
    """The attempts' hours, each at its own price, else at that of what was chosen; of the newest until now, if it is
    at work.
    """
    usd = run.cost(now=now if at_work else None, usd_per_h=usd_per_h).usd
    return None if usd is None else round(usd, 2)


def _standings(
    cloud: Cloud, sents: Sequence[Sent], *, everything: bool
) -> tuple[dict[tuple[Kind, str], JobStatus], UserError | None]:
    found: dict[tuple[Kind, str], JobStatus] = {}
    jobs = [sent.name for sent in sents if sent.kind == "managed job"]
    clusters = [sent.name for sent in sents if sent.kind == "cluster"]
    try:
        if jobs or everything:
            found |= _keyed(cloud.jobs(None if everything else jobs))
        if clusters or everything:
            found |= _keyed(cloud.clusters(None if everything else clusters))
    except UserError as error:
        return found, error
    return found, None


def _keyed(standings: Mapping[str, JobStatus]) -> dict[tuple[Kind, str], JobStatus]:
    return {(standing.kind, name): standing for name, standing in standings.items()}


def _read(each: Known) -> RunHistory | UserError:
    record = each.record
    try:
        return Reader(open_run(record.checkpoints, record.run_id), record.run_id).read()
    except UserError as error:  # a bucket may be out of reach; the row says so
        return error


def _local(each: Local, run: RunHistory | UserError, *, now: float) -> RowDict:
    alive = each.record.process() is not None
    row = _row(each.record, "local", "this machine", run)
    row["pid"] = each.record.pid if alive else None
    if not isinstance(run, UserError):
        row["usd"] = usd_so_far(run, None, now=now, at_work=alive)
    if isinstance(run, UserError):
        row["state"] = "running" if alive else "?"
    else:
        row["state"] = "running" if alive and run.state != "done" else stopped(run)
    return row


def _submitted(
    sent: Sent,
    standing: JobStatus | None,
    run: RunHistory | UserError,
    *,
    fault: UserError | None,
    now: float,
) -> RowDict:
    where = standing.where if standing and standing.where else sent.where
    number = f" {sent.job_id}" if sent.kind == "managed job" and sent.job_id is not None else ""
    row = _row(sent, sent.kind, f"{sent.kind}{number}: {where}", run)
    row["said"] = standing.said if standing else None
    if isinstance(run, UserError):
        row["state"] = standing.phase if standing else "?"
        return row
    at_work = standing is not None and standing.at_work
    row["usd"] = usd_so_far(run, sent.usd_per_h, now=now, at_work=at_work)
    row["state"] = state_of(standing, run, unsure=fault is not None)
    row["error"] = fault.message if fault and not sent.over else None
    return row


def state_of(standing: JobStatus | None, run: RunHistory, *, unsure: bool) -> str:
    """The bucket knows of the end, SkyPilot of the way there; an attempt with no end was lost with its machine."""
    if run.state == "done":
        return "done"
    if run.state == "stopped" and not (standing and standing.at_work):
        return "stopped"  # SkyPilot calls it failed
    if standing and standing.phase != "idle":
        return standing.phase
    return run.state if unsure else stopped(run)


def stopped(run: RunHistory) -> str:
    return "preempted" if run.state == "running" else run.state


def _gone(standing: JobStatus) -> bool:
    return standing.kind == "managed job" and not standing.at_work


def _row(record: LocalRecord | Sent, kind: str, where: str, run: RunHistory | UserError) -> RowDict:
    row: RowDict = {
        "run": record.run_id,
        "kind": kind,
        "where": where,
        "state": "?",
        "step": None,
        "committed": None,
        "attempts": None,
        "usd": None,
        "recipe": record.recipe,
        "checkpoints": record.checkpoints,
        "pid": None,
        "said": None,
        "error": None,
    }
    if isinstance(run, UserError):
        return {**row, "error": run.message}
    seen = {"step": run.step, "committed": max(run.commits, default=None), "attempts": len(run.attempts)}
    return {**row, **seen}


def _unknown(standing: JobStatus) -> RowDict:
    """What SkyPilot has that was not submitted from here: it need not be a run of ours."""
    where = f"{standing.kind}: {standing.where}" if standing.where else standing.kind
    empty = dict.fromkeys(("step", "committed", "attempts", "usd", "recipe", "checkpoints", "pid", "error"))
    facts = {"run": standing.name, "kind": standing.kind, "where": where, "state": standing.phase}
    return {**facts, **empty, "said": standing.said}

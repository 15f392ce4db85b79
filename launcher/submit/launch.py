"""Launches an order, unless its run is at work or done, and follows it to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.cloud.protocol import Cloud, JobStatus, Kind, Say, find
from launcher.image import builders
from launcher.image.builders import BuildOptions
from launcher.local import process
from launcher.local.follow import Ending, How, stopped_text
from launcher.registry import submitted
from launcher.registry.local import Home
from launcher.registry.submitted import Sent
from launcher.runs import limits
from launcher.runs.run import Reader, RunHistory
from launcher.submit.prepare import Order
from launcher.terminal import Answer
from trainer.bucket import open_run
from trainer.errors import ExitCode, UserError
from trainer.events import Event

POLL_S = 5.0
"""Between two looks at a managed job that waits for a machine; SkyPilot's controller looks every 20 s."""
REATTACH_LINES = 20
"""Lines of the log that somebody who comes back is shown."""
BROKEN = 5
"""Log streams that may break in a row, the job at work all the while."""
Ask = Callable[[], Answer]


@dataclass(frozen=True)
class SubmitContext:
    """Where a submission is made: this machine's memory of them, the cloud, the terminal, the clock."""

    cloud: Cloud
    state: Path
    say: Say
    build: Callable[[BuildOptions, Say], object] = builders.ensure
    """Makes an order's image."""
    ask: Ask | None = None
    """What a Ctrl-C asks; without it, Ctrl-C leaves the run at work."""
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


def submit(order: Order, desk: SubmitContext, *, detach: bool) -> tuple[Ending, RunHistory]:
    """Bring the run to its end, or leave it at work if the user wants that; what is at work is never rented twice.

    Raises:
        UserError: the run is at work on this machine, its bucket cannot be read, or SkyPilot refuses the task.
        Unavailable: no machine can be had, or SkyPilot's server is away.
    """
    request = order.request
    reader = Reader(open_run(request.checkpoints, request.run_id), request.run_id)
    run = reader.read()
    if run.state == "done":
        return Ending("done", f"run {request.run_id} is done since {run.finished}: {run.final_uri}"), run
    _not_here(order, desk.state)
    standing = _at_work(order, desk)
    came_back = standing is not None
    if standing is None:
        limits.refuse_used_up(run, order.limits, now=datetime.fromtimestamp(desk.now(), UTC))
        standing = _launch(order, desk)
    elif told := limits.changed_limits_note(run, order.limits):
        desk.say(told)
    if detach:
        return Ending("detached", detached_text(standing, request.run_id)), run
    tail, seen = (REATTACH_LINES, 0) if came_back else (0, len(run.attempts))
    return follow(standing, reader, desk, run_id=request.run_id, tail=tail, seen=seen)


def follow(
    standing: JobStatus, reader: Reader, desk: SubmitContext, *, run_id: str, tail: int = 0, seen: int = 0
) -> tuple[Ending, RunHistory]:
    """Show the log until the job ends, or the user leaves it; the first `seen` attempts are of earlier jobs."""
    try:
        ended = _watch(standing, desk, tail=tail)
    except KeyboardInterrupt:
        answer = desk.ask() if desk.ask else "detach"
        if answer == "continue":
            return follow(standing, reader, desk, run_id=run_id, tail=REATTACH_LINES, seen=seen)
        if answer == "detach":
            return Ending("detached", detached_text(standing, run_id)), reader.read()
        cancel(standing, desk.cloud, reader, desk.say, sleep=desk.sleep)
        ended = find(desk.cloud, standing.name, standing.kind)
    run = reader.read()
    if ended and ended.at_work:
        return Ending("detached", f"the log breaks off again and again; {detached_text(ended, run_id)}"), run
    how = judge(ended, run, seen=seen)
    return Ending(how, _told(how, ended, run, seen=seen)), run


def judge(standing: JobStatus | None, run: RunHistory, *, seen: int = 0) -> How:
    """What became of a job that is no longer at work; a cluster that is gone leaves its run's bucket to tell.

    The ends of the first `seen` attempts are other jobs': this one may have had no machine at all.
    """
    if run.state == "done":
        return "done"
    end = _end(run, seen)
    if end and end["kind"] == "stopped":
        return "stopped"
    if end and end["kind"] == "failed" and end.get("exit_code") in (ExitCode.USAGE, ExitCode.CONFIG):
        return "refused"
    if end and end["kind"] == "superseded":
        return "superseded"
    if standing is None or standing.phase in ("cancelled", "idle", "stopping"):
        return "cancelled"
    return "failed"


def detached_text(standing: JobStatus, run_id: str) -> str:
    """What somebody who leaves needs to come back."""
    return (
        f"training goes on by itself: {_what(standing)}\n"
        f"  the same command follows it again, and so does `launcher logs {run_id} -f`; "
        f"`launcher cancel {run_id}` stops it"
    )


def _not_here(order: Order, state: Path) -> None:
    home = Home.of(state, order.request.run_id, order.request.checkpoints)
    if found := process.attach(home):
        raise UserError(
            f"run {order.request.run_id} is at work on this machine (pid {found.pid})",
            hint=f"`launcher cancel {order.request.run_id}` first, or choose another `--name`",
        )


def _at_work(order: Order, desk: SubmitContext) -> JobStatus | None:
    """The run's job that is at work already."""
    standing = find(desk.cloud, order.name)
    if standing is None or not standing.at_work:
        return None
    mine = submitted.recall(desk.state, order.request.run_id, order.request.checkpoints)
    others = [sent for sent in submitted.known(desk.state) if sent.name == order.name]
    if mine is None and others:
        raise UserError(
            f"{_what(standing)} is at work on a run of this name in {others[0].checkpoints}",
            hint="choose another `--name`",
        )
    desk.say(f"run {order.request.run_id} is at work already, as {_what(standing)}: nothing is rented")
    if mine is None:  # submitted from elsewhere
        submitted.remember(desk.state, _sent(order, desk, standing.job_id, kind=standing.kind))
    return standing


def _launch(order: Order, desk: SubmitContext) -> JobStatus:
    if order.build:
        desk.build(order.build, desk.say)
    before = submitted.recall(desk.state, order.request.run_id, order.request.checkpoints)
    kind: Kind = "managed job" if order.managed else "cluster"
    sent = _sent(order, desk, None, kind=kind)
    submitted.remember(desk.state, sent)
    try:
        job_id = _ask(order, desk)
    except (UserError, KeyboardInterrupt):
        _forget(before, sent, desk)
        raise
    submitted.remember(desk.state, sent.model_copy(update={"job_id": job_id}))
    found = find(desk.cloud, order.name, kind)
    return found or JobStatus(kind=kind, name=order.name, job_id=job_id, phase="waiting", said="SUBMITTED")


def _ask(order: Order, desk: SubmitContext) -> int | None:
    if order.managed:
        return desk.cloud.launch_managed(order.config, name=order.name, secrets=order.secrets, say=desk.say)
    return desk.cloud.launch(
        order.config,
        name=order.name,
        secrets=order.secrets,
        retry_until_up=order.retry_until_up,
        say=desk.say,
    )


def _forget(before: Sent | None, sent: Sent, desk: SubmitContext) -> None:
    """A launch that failed leaves no record, unless it left a machine: that one must be seen in `status`."""
    left: JobStatus | None = None
    with contextlib.suppress(UserError):
        left = find(desk.cloud, sent.name, sent.kind)
    if left is None and before:
        submitted.remember(desk.state, before)
    elif left is None:
        submitted.forget(desk.state, sent)


def _sent(order: Order, desk: SubmitContext, job_id: int | None, *, kind: Kind) -> Sent:
    return Sent(
        run_id=order.request.run_id,
        recipe=order.recipe,
        checkpoints=order.request.checkpoints,
        kind=kind,
        name=order.name,
        job_id=job_id,
        where=order.where,
        usd_per_h=order.row.usd_per_h if order.row else None,
        submitted=desk.now(),
        options=dict(order.options),
        mounts=dict(order.request.mounts),
    )


def _watch(standing: JobStatus, desk: SubmitContext, *, tail: int) -> JobStatus | None:
    """Until the job is no longer at work: how it stands then; None if its cluster is gone."""
    now: JobStatus | None = standing
    broken = 0
    while now and now.at_work and broken < BROKEN:
        now = _wait_for_machine(now, desk)
        if now and now.at_work:
            desk.cloud.logs(now, desk.say, follow=True, tail=tail)
            now, tail, broken = find(desk.cloud, now.name, now.kind), 1, broken + 1
            if now and now.at_work:
                desk.sleep(POLL_S)
    return now


def _wait_for_machine(standing: JobStatus, desk: SubmitContext) -> JobStatus | None:
    """A managed job that waits for its machine: what its controller tries where, as it tries it."""
    now: JobStatus | None = standing
    seen = 0
    while now and now.kind == "managed job" and now.phase == "waiting":
        lines = desk.cloud.tried(now)
        for line in lines[seen:]:
            desk.say(line)
        seen = max(seen, len(lines))
        desk.sleep(POLL_S)
        now = find(desk.cloud, now.name, now.kind)
    return now


def _end(run: RunHistory, seen: int) -> Event | None:
    return run.attempts[-1].end if len(run.attempts) > seen else None


def _told(how: How, standing: JobStatus | None, run: RunHistory, *, seen: int) -> str:
    end = _end(run, seen)
    said = str(end.get("message", "")) if end else ""
    why = said or (standing.reason if standing and standing.reason else "") or "it left no message"
    commit = max(run.commits, default=None)
    place = "from the beginning: nothing was committed yet" if commit is None else f"from step {commit}"
    paid = standing is not None and standing.kind == "cluster"
    rest = f"\n  its cluster is still there: `launcher down {run.run_id}`" if paid else ""
    messages: dict[How, str] = {
        "done": f"done: {run.final_uri}",
        "cancelled": f"cancelled; the same command goes on {place}",
        "stopped": stopped_text(run.run_id, why),
        "refused": f"the run cannot start like this: {why}",
        "superseded": "a newer attempt, submitted elsewhere, owns the run now; nothing to do here",
        "failed": f"the job failed ({standing.said if standing else 'gone'}): {why}\n"
        f"  `launcher logs {run.run_id}` has the rest; the same command goes on {place}",
    }
    return messages[how] + rest


def _what(standing: JobStatus) -> str:
    number = f" {standing.job_id}" if standing.kind == "managed job" and standing.job_id is not None else ""
    where = f" on {standing.where}" if standing.where else ""
    return f"{standing.kind}{number} {standing.name}{where} ({standing.said})"


GRACE_S = 45.0
"""On a cluster: SkyPilot sends SIGTERM, and SIGKILL 30 s later (`sky/skylet/subprocess_daemon.py`, 0.14.1)."""
GONE_S = 600.0
"""For a managed job to be CANCELLED: until then its machine is being given back."""
CANCEL_POLL_S = 2.0


def cancel(
    standing: JobStatus,
    cloud: Cloud,
    reader: Reader,
    say: Say,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> RunHistory:
    """Cancel the job; returns the run as it was left.

    Raises:
        UserError: SkyPilot refuses, or the bucket cannot be read.
    """
    cloud.cancel(standing, say)
    until = clock() + (GRACE_S if standing.kind == "cluster" else GONE_S)
    while not _over(standing, cloud, reader.read()) and clock() < until:
        sleep(CANCEL_POLL_S)
    return reader.read()


def _over(standing: JobStatus, cloud: Cloud, run: RunHistory) -> bool:
    """Whether the attempt has told its end; a managed job must be gone, too."""
    if standing.kind == "cluster":
        return not run.attempts or run.attempts[-1].end is not None
    now = find(cloud, standing.name, standing.kind)
    return now is None or not now.at_work

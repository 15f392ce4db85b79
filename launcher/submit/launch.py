"""Launch a submission on its backend, unless its run is done or already running, and follow it to its end."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path

from launcher.cloud.protocol import JobStatus, find
from launcher.local import process
from launcher.local.process import Home
from launcher.registry import submitted
from launcher.registry.submitted import StartedRun
from launcher.runs import limits
from launcher.runs.run import Reader, RunHistory
from launcher.submit.follow import Follower, SubmitContext
from launcher.submit.outcome import Ending, detached_text
from launcher.submit.prepare import Submission
from launcher.terminal import Signals
from trainer.bucket import open_run
from trainer.errors import UserError


def submit(job: Submission, context: SubmitContext, *, detach: bool) -> tuple[Ending, RunHistory]:
    """Bring the run to its end, or leave it running if the user wants that. A running job is never started twice.

    Raises:
        UserError: the run is running on this machine already, its limits are used up, its bucket cannot be read, or
            SkyPilot refuses the task.
        Unavailable: no machine is available, or SkyPilot's server does not answer.
    """
    launch = job.launch
    reader = Reader(open_run(launch.checkpoints, launch.run_id), launch.run_id)
    run = reader.read()
    if run.state == "done":
        return Ending("done", f"run {launch.run_id} is done since {run.finished}: {run.final_uri}"), run
    _refuse_running_here(job, context.state)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals()) if context.backend.polls else None
        stack.enter_context(context.view)
        status = _running(job, context)
        came_back = status is not None
        if status is None:
            limits.refuse_used_up(run, job.limits, now=datetime.fromtimestamp(context.now(), UTC))
            status = _launch(job, context)
        elif note := limits.changed_limits_note(run, job.limits):
            context.view.note(note)
        if detach:
            return Ending("detached", detached_text(status, launch.run_id)), run
        follower = Follower(job, run, reader, context, signals, relaunch=lambda: _launch(job, context))
        return follower.follow(status, came_back=came_back), follower.run


def _refuse_running_here(job: Submission, state: Path) -> None:
    """Refuse to rent a machine for a run that is running on this one: two attempts would compete for it."""
    launch = job.launch
    found = process.attach(Home.of(state, launch.run_id, launch.checkpoints))
    if found and launch.kind != "local":
        raise UserError(
            f"run {launch.run_id} is already running on this machine (pid {found.pid})",
            hint=f"`launcher cancel {launch.run_id}` first, or choose another `--name`",
        )


def _running(job: Submission, context: SubmitContext) -> JobStatus | None:
    """Return the run's job if it is already running.

    Raises:
        UserError: the job of this name belongs to a run in another bucket.
    """
    launch = job.launch
    # A submission to SkyPilot follows the run whether it is a managed job or a cluster.
    status = find(context.backend, launch.name)
    if status is None or not status.at_work:
        return None
    mine = submitted.recall(context.state, launch.run_id, launch.checkpoints)
    others = [record for record in submitted.submissions(context.state) if record.name == launch.name]
    if mine is None and others:
        raise UserError(
            f"{status.describe()} belongs to a run of the same name in another bucket, {others[0].checkpoints}",
            hint="choose another `--name`",
        )
    context.view.note(f"run {launch.run_id} is already running, as {status.describe()}: following it")
    if mine is None:  # submitted from another machine
        record = _record(job, context, status.job_id).model_copy(update={"kind": status.kind})
        submitted.remember(context.state, record)
    return status


def _launch(job: Submission, context: SubmitContext) -> JobStatus:
    """Build the image if there is one to build, record the job, launch it, and return its status."""
    launch, say = job.launch, context.view.note
    if job.build:
        context.build(job.build, say)
    before = submitted.recall(context.state, launch.run_id, launch.checkpoints)
    record = _record(job, context, None)
    submitted.remember(context.state, record)
    try:
        job_id = context.backend.launch(launch, say)
    except (UserError, KeyboardInterrupt):
        _forget(before, record, context)
        raise
    submitted.remember(context.state, record.model_copy(update={"job_id": job_id}))
    found = find(context.backend, launch.name, launch.kind)
    return found or JobStatus(
        kind=launch.kind, name=launch.name, job_id=job_id, phase="waiting", raw_status="SUBMITTED"
    )


def _forget(before: StartedRun | None, record: StartedRun, context: SubmitContext) -> None:
    """Remove the record of a failed launch, unless the launch left a machine, which `status` must show."""
    left: JobStatus | None = None
    with contextlib.suppress(UserError):
        left = find(context.backend, record.name, record.kind)
    if left is None and before:
        submitted.remember(context.state, before)
    elif left is None:
        submitted.forget(context.state, record)


def _record(job: Submission, context: SubmitContext, job_id: int | None) -> StartedRun:
    launch = job.launch
    return StartedRun(
        run_id=launch.run_id,
        recipe=launch.recipe,
        checkpoints=launch.checkpoints,
        kind=launch.kind,
        name=launch.name,
        job_id=job_id,
        where=job.where,
        usd_per_h=job.row.usd_per_h if job.row else None,
        submitted=context.now(),
        options=dict(job.options),
        mounts=dict(job.mounts),
    )

"""One attempt at a run: claim, restore, train, upload, commit, and an exit code that tells the truth.

Needs no torch and knows nothing of the training program but the files of `trainer.job`, so it
outlives a crash of training and still uploads the last staged checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial

from trainer import run_record
from trainer.accounting import Limits
from trainer.architecture import Architecture
from trainer.architecture.lookup import HubAway, architecture_for
from trainer.bucket import Bucket, attempts, open_run
from trainer.bucket.layout import ATTEMPTS_PREFIX, events_key, final_uri
from trainer.bucket.manifest import final
from trainer.bucket.node_parts import Node
from trainer.errors import ExitCode, ModelError, Superseded, UserError
from trainer.events import EventLog
from trainer.fit import fit
from trainer.hardware import Shape, detect
from trainer.job import STEPS
from trainer.memory import checkpoint_bytes
from trainer.recipe import Recipe
from trainer.supervisor import export
from trainer.supervisor.attempt import AttemptRunner, RunRequest
from trainer.supervisor.budget import BudgetWatch
from trainer.supervisor.heartbeat import Heartbeat
from trainer.supervisor.preemption import Notice
from trainer.supervisor.price import booted_here, plan_here, price_here
from trainer.supervisor.reporter import Reporter
from trainer.supervisor.staging import folders
from trainer.supervisor.team import ALONE, Position, Team, meet
from trainer.supervisor.workers import worker_python

log = logging.getLogger(__name__)
FOLDER_EVERY_S = 0.25
STORE_EVERY_S = 2.0
"""Seconds between two writes of the events: a store is paid by the request."""
HUB_PAUSES_S = (5.0, 15.0, 45.0)
"""Between tries of a Hub that does not answer: a minute of waiting is cheaper than another machine."""


def run(request: RunRequest, notice: Notice, where: Position = ALONE) -> ExitCode:
    """Bring the run as far as this machine lasts, with the other nodes that were started with it.

    Raises:
        UserError: with the exit code that says whether a recovery can help.
    """
    bucket = open_run(request.checkpoints, request.run_id)
    if done := final(bucket):
        export.complete(bucket, done)
        log.info("run %s is done since %s: %s/", request.run_id, done.created, final_uri(bucket.uri))
        return ExitCode.DONE
    python = worker_python()
    team = meet(where, request.digest(), detect(), lambda: notice.given)
    try:
        code = _take_part(request, bucket, team, notice, python)
    except UserError as error:
        team.end(error.exit_code, error.message, error.hint)
        raise
    except BaseException as error:  # the other nodes must not wait for this one
        team.end(ExitCode.BUG, repr(error))
        raise
    return team.end(code)


def _take_part(request: RunRequest, bucket: Bucket, team: Team, notice: Notice, python: str) -> ExitCode:
    """Claim the run, or hear that node 0 has, and see the attempt through."""
    if team.terms:
        attempt = attempts.Attempt(
            bucket, team.terms.attempt, token=team.terms.token, exclusive=team.terms.exclusive
        )
        planned, predicted = team.terms.fit, team.terms.predicted
    else:
        run_record.write_or_compare(bucket, request.run_id, request.recipe, request.notes)
        architecture = look_up(request.recipe, team.shape, bucket, notice)
        planned = fit(request.recipe, team.shape, architecture)
        predicted = checkpoint_bytes(request.recipe, architecture, planned) if architecture else None
        if notice.given:
            return ExitCode.RECOVER
        attempt = attempts.claim(bucket, {"node": team.shape.node, "shape": str(team.shape)})
        team.begin(attempt, planned, predicted)
    every_s = FOLDER_EVERY_S if bucket.is_folder else STORE_EVERY_S
    events = EventLog(attempt.number, _writer(bucket, attempt, team.node), every_s=every_s)
    with (
        folders(request.work, attempt.number, request.tmpfs, node=team.node.rank) as mine,
        Heartbeat(events, attempt, every_s=min(1.0, every_s)) as heartbeat,
    ):
        narrator = Reporter(events, request.recipe, mine.work / STEPS, window=lambda: notice.window)
        price = price_here(team.shape)
        before = cache(partial(run_record.events_before, bucket, attempt.number))
        booted = None if team.node.rank else booted_here(team.shape.node, before)
        claimed = narrator.claimed(
            team.shape,
            planned,
            bucket.uri,
            price=price,
            plan=plan_here(),
            limits=request.limits,
            booted=booted,
        )
        if not attempt.exclusive:
            narrator.warned(attempts.NOT_EXCLUSIVE)
        kept = Limits() if team.node.rank else request.limits  # node 0 watches for all
        limits = BudgetWatch(kept, narrator, claimed=claimed, earlier=before)
        try:
            return AttemptRunner(
                request,
                bucket,
                attempt,
                heartbeat,
                narrator,
                mine=mine,
                team=team,
                predicted=predicted,
                limits=limits,
            ).run(planned, python, notice)
        except Superseded as error:
            narrator.superseded(error)
            raise
        except UserError as error:
            narrator.failed(error.message, error.exit_code)
            raise


def look_up(
    recipe: Recipe, shape: Shape, bucket: Bucket, notice: Notice, pauses_s: Sequence[float] = HUB_PAUSES_S
) -> Architecture | None:
    """The model's numbers; a Hub that does not answer is asked again, after each of the pauses.

    Raises:
        UserError: as `architecture_for`.
        HubAway: it still does not, and an earlier attempt at the run came past this: another machine may be luckier. Of
            a run that begins it is a ModelError, for the name may be wrong.
    """
    for pause_s in pauses_s:
        try:
            return architecture_for(recipe, shape)
        except HubAway as error:
            log.warning("asked again in %.0f s: %s", pause_s, error.message)
            if notice.wait(pause_s):
                break
    try:
        return architecture_for(recipe, shape)
    except HubAway as error:
        if bucket.list(ATTEMPTS_PREFIX):
            raise
        raise ModelError(error.message, hint=error.hint) from None


def _writer(bucket: Bucket, attempt: attempts.Attempt, node: Node) -> Callable[[bytes], None]:
    """Where an attempt's events go: node 0 tells them for all."""
    key = events_key(attempt.number)
    return (lambda _: None) if node.rank else (lambda data: bucket.put(key, data))

"""`run`: one attempt at a run on this machine, from the claim to the exit code.

The supervisor does not import torch. It shares nothing with the training program but the files of `trainer.job`, so it
survives a crash of the training program and still uploads the last staged checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import TracebackType
from typing import Self

from trainer import run_record
from trainer.accounting import Limits
from trainer.architecture import Architecture
from trainer.architecture.lookup import HubAway, architecture_for
from trainer.bucket import Bucket, attempts, open_run
from trainer.bucket.commit import Node
from trainer.bucket.layout import ATTEMPTS_PREFIX, events_key, final_uri
from trainer.bucket.manifest import final
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
from trainer.supervisor.preemption import Notice
from trainer.supervisor.price import detect_price, paid_boot_time, read_plan
from trainer.supervisor.reporter import Reporter
from trainer.supervisor.staging import attempt_folders
from trainer.supervisor.team import ALONE, Position, Team, connect
from trainer.supervisor.workers import worker_python

log = logging.getLogger(__name__)
FOLDER_EVERY_S = 0.25
STORE_EVERY_S = 2.0
"""Seconds between two writes of the events. Stores charge for each request."""
CHECK_CLAIM_S = 30.0
WARN_EVERY_S = 60.0
"""Seconds between two warnings of the heartbeat while a store fails."""
HUB_PAUSES_S = (5.0, 15.0, 45.0)
"""Pauses between requests to a Hub that does not answer. Waiting a minute costs less than another machine."""


def run(request: RunRequest, notice: Notice, position: Position = ALONE) -> ExitCode:
    """Run one attempt, together with the other nodes that were started with this one.

    Raises:
        UserError: the attempt failed. The exit code shows whether a recovery can help.
    """
    bucket = open_run(request.checkpoints, request.run_id)
    if done := final(bucket):
        export.complete(bucket, done)
        log.info("run %s was completed at %s: %s/", request.run_id, done.created, final_uri(bucket.uri))
        return ExitCode.DONE
    python = worker_python()
    team = connect(position, request.digest(), detect(), lambda: notice.given)
    try:
        code = _run_attempt(request, bucket, team, notice, python)
    except UserError as error:
        team.end(error.exit_code, error.message, error.hint)
        raise
    except BaseException as error:  # the other nodes must not wait for this one
        team.end(ExitCode.BUG, repr(error))
        raise
    return team.end(code)


def _run_attempt(request: RunRequest, bucket: Bucket, team: Team, notice: Notice, python: str) -> ExitCode:
    """Claim the run, or take over node 0's claim, and run the attempt."""
    if team.terms:  # node 0 has claimed the run and decided the fit
        attempt = attempts.Attempt(
            bucket, team.terms.attempt, token=team.terms.token, exclusive=team.terms.exclusive
        )
        planned, predicted = team.terms.fit, team.terms.predicted
    else:
        run_record.write_or_compare(bucket, request.run_id, request.recipe, request.notes)
        architecture = look_up_architecture(request.recipe, team.shape, bucket, notice)
        planned = fit(request.recipe, team.shape, architecture)
        predicted = checkpoint_bytes(request.recipe, architecture, planned) if architecture else None
        if notice.given:  # this machine is being preempted, so it claims no attempt
            return ExitCode.RECOVER
        attempt = attempts.claim(bucket, {"node": team.shape.node, "shape": str(team.shape)})
        team.announce(attempt, planned, predicted)
    # From here on everything that happens is an event in the bucket.
    every_s = FOLDER_EVERY_S if bucket.is_folder else STORE_EVERY_S
    events = EventLog(attempt.number, _event_writer(bucket, attempt, team.node), every_s=every_s)
    with (
        attempt_folders(request.work, attempt.number, request.tmpfs, node=team.node.rank) as folders,
        Heartbeat(events, attempt, every_s=min(1.0, every_s)) as heartbeat,
    ):
        reporter = Reporter(events, request.recipe, folders.work / STEPS, window=lambda: notice.window)
        earlier = cache(partial(run_record.events_before, bucket, attempt.number))
        claimed = reporter.claimed(
            team.shape,
            planned,
            bucket.uri,
            price=detect_price(team.shape),
            plan=read_plan(),
            limits=request.limits,
            booted=None if team.node.rank else paid_boot_time(team.shape.node, earlier),
        )
        if not attempt.exclusive:
            reporter.warned(attempts.NOT_EXCLUSIVE)
        watched = Limits() if team.node.rank else request.limits  # node 0 watches the limits for all nodes
        limits = BudgetWatch(watched, reporter, claimed=claimed, earlier=earlier)
        try:
            return AttemptRunner(
                request,
                bucket,
                attempt,
                reporter,
                superseded=lambda: heartbeat.superseded,
                folders=folders,
                team=team,
                predicted=predicted,
                limits=limits,
            ).run(planned, python, notice)
        except Superseded as error:
            reporter.superseded(error)
            raise
        except UserError as error:
            reporter.failed(error.message, error.exit_code)
            raise


def look_up_architecture(
    recipe: Recipe, shape: Shape, bucket: Bucket, notice: Notice, pauses_s: Sequence[float] = HUB_PAUSES_S
) -> Architecture | None:
    """Return the model's architecture. If the Hub does not answer, ask again after each of the pauses.

    Raises:
        UserError: as `architecture_for`.
        HubAway: the Hub never answered, but an earlier attempt of the run got past this point. Another machine may
            reach the Hub.
        ModelError: the Hub never answered and this is the first attempt. The model's name may be wrong.
    """
    for pause_s in pauses_s:
        try:
            return architecture_for(recipe, shape)
        except HubAway as error:
            log.warning("retrying in %.0f s: %s", pause_s, error.message)
            if notice.wait(pause_s):
                break
    try:
        return architecture_for(recipe, shape)
    except HubAway as error:
        if bucket.list(ATTEMPTS_PREFIX):
            raise
        raise ModelError(error.message, hint=error.hint) from None


class Heartbeat:
    """Writes the attempt's events to the bucket, and checks that no newer attempt has claimed the run.

    It is a thread, so that a slow or unreachable store never blocks the supervisor.
    """

    def __init__(
        self,
        events: EventLog,
        attempt: attempts.Attempt,
        *,
        every_s: float = 1.0,
        check_s: float = CHECK_CLAIM_S,
    ) -> None:
        self._events = events
        self._attempt = attempt
        self._every_s = every_s
        self._check_s = check_s
        self._ended = threading.Event()
        self._warned_at = -WARN_EVERY_S
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.superseded: Superseded | None = None
        """The error that names the newer attempt. None while this attempt holds the claim."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the thread and write the remaining events, so that the bucket has all events of the attempt."""
        self._ended.set()
        self._thread.join()
        self._try_to_write(now=True)

    def _beat(self) -> None:
        checked_at = time.monotonic()
        while not self._ended.wait(self._every_s) and self.superseded is None:
            self._try_to_write(now=False)
            if time.monotonic() - checked_at >= self._check_s:
                checked_at = time.monotonic()
                self._check_claim()

    def _check_claim(self) -> None:
        try:
            self._attempt.check()
        except Superseded as error:
            self.superseded = error
        except UserError as error:
            self._warn("cannot check whether this attempt still holds the run", error)

    def _try_to_write(self, *, now: bool) -> None:
        try:
            self._events.flush(now=now)
        except UserError as error:  # the events stay in memory until the next beat
            self._warn("cannot write the run's events", error)

    def _warn(self, what: str, error: UserError) -> None:
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            log.warning("%s: %s", what, error.message)


def _event_writer(bucket: Bucket, attempt: attempts.Attempt, node: Node) -> Callable[[bytes], None]:
    """Return the function that writes the attempt's events to the bucket. Only node 0 writes them."""
    key = events_key(attempt.number)
    return (lambda _: None) if node.rank else (lambda data: bucket.put(key, data))

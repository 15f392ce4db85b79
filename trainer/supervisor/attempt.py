"""One attempt from its claim to its exit code: restore, train, upload, commit.

Everything that happens after the claim is recorded in the run's events.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

from trainer import run_record
from trainer.accounting import Limits
from trainer.bucket import Bucket, attempts
from trainer.bucket.commit import WAITING
from trainer.bucket.manifest import final
from trainer.bucket.reference_cache import ReferenceCache, open_cache
from trainer.bucket.uploader import Uploader
from trainer.disk_full import reserve_disk, room_in
from trainer.errors import ExitCode, NoRoom, RecipeError, Superseded, Unavailable, UserError
from trainer.fit import Fit
from trainer.job import Job, Outcome
from trainer.recipe import Recipe
from trainer.recipe.model import reference_key
from trainer.supervisor import export
from trainer.supervisor.budget import BudgetWatch
from trainer.supervisor.preemption import Notice
from trainer.supervisor.reporter import Reporter
from trainer.supervisor.staging import (
    MEMORY_RESERVE,
    TMPFS,
    AttemptFolders,
    StagingChoice,
    choose_placement,
    expected_size,
)
from trainer.supervisor.team import Team
from trainer.supervisor.transfers import (
    TransferCancelled,
    TransferProgress,
    fetch_data,
    fetch_model,
    sync_trackers,
)
from trainer.supervisor.workers import PROGRAM, Workers

POLL_S = 0.1
MAX_FRUITLESS = 2
"""After this many attempts in a row that committed nothing, another recovery is not expected to help."""


class RunRequest(BaseModel):
    """A run, the folder that contains it, and its limits."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    notes: tuple[str, ...] = ()
    checkpoints: str
    """URI of the folder of runs: gs://, s3:// or a path."""
    run_id: str
    program: str = PROGRAM
    work: Path
    """Folder of this machine for the attempts of the run. It holds staged and restored checkpoints."""
    staging: StagingChoice = "auto"
    tmpfs: Path = TMPFS
    """Folder of an in-memory file system."""
    limits: Limits = Limits()

    def digest(self) -> str:
        """Return a digest of everything that all nodes of a run must agree on."""
        text = f"{self.checkpoints}\n{self.run_id}\n{self.recipe.digest()}"
        return xxhash.xxh3_128_hexdigest(text.encode())


class AttemptRunner:
    """Runs a claimed attempt and returns its exit code."""

    def __init__(  # noqa: PLR0913 (everything that a claim brings together)
        self,
        request: RunRequest,
        bucket: Bucket,
        attempt: attempts.Attempt,
        reporter: Reporter,
        *,
        superseded: Callable[[], Superseded | None],
        folders: AttemptFolders,
        team: Team,
        predicted: int | None,
        limits: BudgetWatch,
    ) -> None:
        """Prepare to run a claimed attempt.

        Args:
            request: the run.
            bucket: the run's bucket.
            attempt: the claim.
            reporter: records what happens.
            superseded: returns the error that names a newer attempt. None while this attempt holds the claim.
            folders: the attempt's folders on this machine.
            team: the nodes.
            predicted: predicted size of a checkpoint, in bytes. None if unknown.
            limits: watches the budget and the deadline.
        """
        self._request = request
        self._bucket = bucket
        self._attempt = attempt
        self._superseded = superseded
        self._reporter = reporter
        self._folders = folders
        self._team = team
        self._predicted = predicted  # bytes of a checkpoint
        self._reference_cache: ReferenceCache | None = None
        self._rejected: list[int] = []  # steps whose committed checkpoint failed verification
        self._work = folders.work
        self._limits = limits

    def run(self, planned: Fit, python: str, notice: Notice) -> ExitCode:
        """Run the attempt to its end.

        Args:
            planned: how the run is trained on this shape.
            python: path of the workers' Python.
            notice: the preemption notice.

        Raises:
            UserError: its exit code shows whether a recovery can help. A full disk or an unreachable model usually
                can be recovered from, but not after several attempts in a row that committed nothing.
        """
        try:
            with room_in(self._work):
                return self._run(planned, python, notice)
        except (NoRoom, _ModelUnavailable) as error:
            fruitless = run_record.fruitless_attempts(self._bucket, self._attempt.number)
            if fruitless < MAX_FRUITLESS:
                raise
            raise UserError(error.message + _after_fruitless(fruitless), hint=error.hint) from None

    def _run(self, planned: Fit, python: str, notice: Notice) -> ExitCode:
        if self._limits.reached:
            return self._interrupted("before anything was started")
        try:
            job = self._prepare(planned, TransferProgress(notice))
        except TransferCancelled:
            return self._interrupted("before its checkpoint was restored")
        self._limits.check(notice)
        if notice.given:
            return self._interrupted("before the workers were started")
        with sync_trackers(self._bucket, job):
            exit_code = self._train(job, python, notice)
        return self._settle(job, exit_code, notice)

    def _prepare(self, planned: Fit, progress: TransferProgress) -> Job:
        """Fetch the workers' inputs (model, data, newest checkpoint) and return their job."""
        reserve_disk(self._work)
        recipe = fetch_data(self._request.recipe, self._work / "input-data", progress)
        model = fetch_model(recipe.model_name_or_path, self._work / "input-model", progress)
        # Memory that training needs on the host must not be filled with staged checkpoints.
        reserved_gib = MEMORY_RESERVE * self._team.shape.host_memory_gib + planned.offloaded_gib
        placement = choose_placement(
            expected_size(self._bucket, model, self._predicted),
            self._folders.measure_capacity(reserved=int(reserved_gib * 2**30)),
            self._request.staging,
            adapter=recipe.is_lora,
        )
        self._reporter.staging(placement.staging, placement.reason)
        restored = self._team.restore(self._bucket, self._folders.create(placement), self._reject, progress)
        number, run_id = self._attempt.number, self._request.run_id
        self._reference_cache = open_reference_cache(
            recipe, planned, self._request.checkpoints, run_id=run_id, attempt=number
        )
        cached = self._work / "reference"
        # The last attempt's uploads predict how long a save takes, until this attempt has measured its own.
        self._reporter.recall(run_record.last_commits(self._bucket, number))
        self._reporter.restored(restored)
        self._reporter.window()
        return Job(
            run_id=run_id,
            attempt=number,
            recipe=recipe,
            fit=planned,
            work=self._work,
            model=model,
            resume_from=restored.path if restored else None,
            report_id=run_record.report_id(self._bucket) if recipe.reports else "",
            reference=cached if self._reference_cache and self._reference_cache.fetch(cached) else None,
        )

    def _reject(self, step: int, reason: str) -> None:
        self._rejected.append(step)
        self._reporter.rejected(step, reason)

    def _train(self, job: Job, python: str, notice: Notice) -> int:
        """Run the workers, upload everything that they stage, and return their exit code.

        A checkpoint that was staged before a crash is uploaded too.
        """
        uploader = Uploader(
            self._bucket,
            self._attempt,
            job.staging,
            recipe_digest=self._request.recipe.digest(),
            keep=job.recipe.keep_checkpoints,
            listener=self._reporter,
            node=self._team.node,
            waiting=WAITING._replace(gone=lambda: self._team.failure),
            reference_cache=self._reference_cache,
            rejected=self._rejected,
        )
        workers = Workers(job, python, self._request.program, at=self._team.rendezvous)
        uploader.start()
        try:
            exit_code = self._watch(workers, uploader, notice)
            uploader.drain()
        finally:
            workers.kill()
            uploader.stop()
        if failure := self._superseded() or uploader.error:
            raise failure
        return exit_code

    def _watch(self, workers: Workers, uploader: Uploader, notice: Notice) -> int:
        """Report the workers' progress until they end, and return their exit code.

        The first notice of a preemption or of a limit is passed on to the workers once. Workers that then make no
        progress are killed as stuck. Otherwise they would exceed the limit, and a machine that is not preempted
        after all would be paid for until a person notices.
        """
        stopping, progress_at = False, time.monotonic()
        while (exit_code := workers.poll()) is None:
            if uploader.error or self._superseded() or self._team.failure:
                workers.kill()
            self._limits.check(notice)
            source = notice.source if notice.given else self._team.peer_notice
            if source and not stopping:
                stopping = True
                if not self._limits.reached:  # a limit has reported itself
                    self._reporter.notice(source)
                self._team.send_notice(source)
                workers.stop()
                progress_at = time.monotonic()
            if self._reporter.forward_worker_events():
                progress_at = time.monotonic()
            elif stopping and time.monotonic() - progress_at >= self._reporter.stuck_s():
                self._reporter.warned(
                    "the workers were asked to stop, reported nothing since, and are killed as stuck"
                )
                workers.kill()
            workers.wait(POLL_S)
        self._reporter.forward_worker_events()
        return exit_code

    def _settle(self, job: Job, exit_code: int, notice: Notice) -> ExitCode:
        """Turn the workers' outcome into the exit code of the attempt.

        Workers without an outcome were killed or crashed.
        """
        outcome = Outcome.model_validate_json(job.outcome.read_text()) if job.outcome.exists() else None
        exit_code, outcome = self._team.combine_outcomes(exit_code, outcome)
        if self._team.node.rank:
            return ExitCode.RECOVER  # a placeholder: `Team.end` replaces it by node 0's exit code
        if outcome and outcome.status == "user_error":
            raise RecipeError(outcome.message, hint=outcome.hint)
        if outcome and outcome.status == "no_room":
            raise NoRoom(outcome.message, hint=outcome.hint)
        if outcome and outcome.status == "unavailable":
            raise _ModelUnavailable(outcome.message, hint=outcome.hint)
        # The bucket decides whether the run is done: the final model must be committed.
        if outcome and outcome.status == "done" and (model := final(self._bucket)):
            self._reporter.done(model, self._bucket.uri)
            self._reporter.committing()
            export.complete(self._bucket, model)
            return ExitCode.DONE
        if outcome and outcome.status == "preempted":
            return self._interrupted(outcome.message)
        if failure := self._team.failure:
            self._reporter.failed(failure, ExitCode.RECOVER)
            return ExitCode.RECOVER
        if outcome is None and (notice.given or self._team.peer_notice):
            return self._interrupted("before the workers could save")
        return self._crashed(exit_code)

    def _interrupted(self, where: str) -> ExitCode:
        """Report a preemption or a reached limit, and return the exit code for it.

        Args:
            where: the point that the attempt had reached: "at step 10".
        """
        if self._limits.reached:
            self._limits.report_stop(where)
            return ExitCode.LIMIT
        self._reporter.preempted(where)
        return ExitCode.RECOVER

    def _crashed(self, exit_code: int) -> ExitCode:
        """Report a crash. A worker that a signal killed may be recovered, unless the last attempts failed too."""
        fruitless = run_record.fruitless_attempts(self._bucket, self._attempt.number)
        code = ExitCode.RECOVER if exit_code < 0 and fruitless < MAX_FRUITLESS else ExitCode.BUG
        if exit_code < 0:
            message = f"the training process was killed by {signal.Signals(-exit_code).name}"
        else:
            message = f"the training process crashed (exit code {exit_code}); its traceback is above"
        self._reporter.failed(message + _after_fruitless(fruitless), code)
        return code


def open_reference_cache(
    recipe: Recipe, planned: Fit, checkpoints: str, *, run_id: str, attempt: int
) -> ReferenceCache | None:
    """Open the cache of the reference model's log-probabilities. None if the run does not precompute them.

    Raises:
        BucketError, Unavailable: as `open_cache`.
    """
    if planned.reference != "precomputed":
        return None
    return open_cache(checkpoints, reference_key(recipe), run_id=run_id, attempt=attempt)


class _ModelUnavailable(Unavailable):
    """The workers cannot get the model or a GPU. Unlike an unreachable bucket, this may be permanent."""


def _after_fruitless(count: int) -> str:
    if not count:
        return ""
    attempts_text = "the attempt before it" if count == 1 else f"the {count} attempts before it"
    return f"; {attempts_text} committed nothing either"

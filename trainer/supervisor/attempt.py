"""An attempt once it is claimed: restore, train, upload, commit; everything from here on is told to the run's events."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

from trainer import run_record
from trainer.accounting import Limits
from trainer.bucket import Bucket, attempts
from trainer.bucket.manifest import final
from trainer.bucket.node_parts import WAITING
from trainer.bucket.reference_cache import ReferenceCache, open_shelf
from trainer.bucket.uploader import Uploader
from trainer.disk_full import reserve_disk, room_in
from trainer.errors import ExitCode, NoRoom, RecipeError, Unavailable, UserError
from trainer.fit import Fit
from trainer.job import Job, Outcome
from trainer.recipe import Recipe
from trainer.recipe.model import reference_key
from trainer.supervisor import export
from trainer.supervisor.budget import BudgetWatch
from trainer.supervisor.heartbeat import Heartbeat
from trainer.supervisor.inputs import TransferCancelled, TransferProgress, fetch_data, fetch_model
from trainer.supervisor.preemption import Notice
from trainer.supervisor.reporter import Reporter
from trainer.supervisor.staging import RESERVE, TMPFS, Folders, Wanted, expected_size, place
from trainer.supervisor.team import Team
from trainer.supervisor.tracker_sync import mirrored
from trainer.supervisor.workers import PROGRAM, Workers

POLL_S = 0.1
MAX_FRUITLESS = 2
"""Attempts in a row that were killed before they committed anything, after which it is no accident."""


class _ModelUnavailable(Unavailable):
    """The workers have no model or no GPU for now; unlike a bucket that is away, that may be how it stays."""


class AttemptRunner:
    """An attempt from its claim to its exit code."""

    def __init__(  # noqa: PLR0913 (what a claim brings together)
        self,
        request: RunRequest,
        bucket: Bucket,
        attempt: attempts.Attempt,
        heartbeat: Heartbeat,
        narrator: Reporter,
        *,
        mine: Folders,
        team: Team,
        predicted: int | None,
        limits: BudgetWatch,
    ) -> None:
        self._request = request
        self._bucket = bucket
        self._attempt = attempt
        self._heartbeat = heartbeat
        self._narrator = narrator
        self._folders = mine
        self._team = team
        self._predicted = predicted  # bytes of a checkpoint
        self._shelf: ReferenceCache | None = None
        self._rejected: list[int] = []  # steps that were committed and did not verify
        self._work = mine.work
        self._limits = limits

    def run(self, planned: Fit, python: str, notice: Notice) -> ExitCode:
        try:
            with room_in(self._work):
                return self._run(planned, python, notice)
        except (NoRoom, _ModelUnavailable) as error:
            fruitless = run_record.fruitless_attempts(self._bucket, self._attempt.number)
            if fruitless < MAX_FRUITLESS:
                raise
            tries = f"; {fruitless} attempts in a row before it committed nothing"
            raise UserError(error.message + tries, hint=error.hint) from None

    def _run(self, planned: Fit, python: str, notice: Notice) -> ExitCode:
        if self._limits.reached:
            return self._gone("before anything was started")
        try:
            job = self._prepare(planned, TransferProgress(notice))
        except TransferCancelled:
            return self._gone("before its checkpoint was here")
        self._limits.look(notice)
        if notice.given:
            return self._gone("before the workers were started")
        with mirrored(self._bucket, job):
            exit_code = self._train(job, python, notice)
        return self._settle(job, exit_code, notice)

    def _prepare(self, planned: Fit, bringing: TransferProgress) -> Job:
        """Fetch what the workers start from: a model and data that lie in a bucket, the newest checkpoint."""
        reserve_disk(self._work)
        recipe = fetch_data(self._request.recipe, self._work / "input-data", bringing)
        model = fetch_model(recipe.model_name_or_path, self._work / "input-model", bringing)
        placement = place(
            expected_size(self._bucket, model, self._predicted),
            self._folders.look(
                kept=int((RESERVE * self._team.shape.host_memory_gib + planned.offloaded_gib) * 2**30)
            ),
            self._request.staging,
            adapter=recipe.is_lora,
        )
        self._narrator.staging(placement.staging, placement.reason)
        restored = self._team.restore(self._bucket, self._folders.make(placement), self._reject, bringing)
        number, run_id = self._attempt.number, self._request.run_id
        self._shelf = shelf_for(recipe, planned, self._request.checkpoints, run_id=run_id, attempt=number)
        kept = self._work / "reference"
        self._narrator.recall(run_record.last_commits(self._bucket, self._attempt.number))
        self._narrator.restored(restored)
        self._narrator.window()
        return Job(
            run_id=self._request.run_id,
            attempt=self._attempt.number,
            recipe=recipe,
            fit=planned,
            work=self._work,
            model=model,
            resume_from=restored.path if restored else None,
            report_id=run_record.report_id(self._bucket) if recipe.reports else "",
            reference=kept if self._shelf and self._shelf.fetch(kept) else None,
        )

    def _reject(self, step: int, reason: str) -> None:
        self._rejected.append(step)
        self._narrator.rejected(step, reason)

    def _train(self, job: Job, python: str, notice: Notice) -> int:
        """Run the workers and upload what they stage, also what a crash left; the workers' exit code."""
        uploader = Uploader(
            self._bucket,
            self._attempt,
            job.staging,
            recipe_digest=self._request.recipe.digest(),
            keep=job.recipe.keep_checkpoints,
            tell=self._narrator,
            node=self._team.node,
            waiting=WAITING._replace(gone=lambda: self._team.broken),
            shelf=self._shelf,
            rejected=self._rejected,
        )
        workers = Workers(job, python, self._request.program, at=self._team.meeting)
        uploader.start()
        try:
            exit_code = self._watch(workers, uploader, notice)
            uploader.drain()
        finally:
            workers.kill()
            uploader.stop()
        if failure := self._heartbeat.superseded or uploader.error:
            raise failure
        return exit_code

    def _watch(self, workers: Workers, uploader: Uploader, notice: Notice) -> int:
        """Tell what the workers do until they end; hand on a notice, once, and end workers that it finds stuck: a
        limit would be no limit, and a machine that stays would be paid until somebody looks.
        """
        told, heard_at = False, time.monotonic()
        while (exit_code := workers.poll()) is None:
            if uploader.error or self._heartbeat.superseded or self._team.broken:
                workers.kill()
            self._limits.look(notice)
            source = notice.source if notice.given else self._team.noticed
            if source and not told:
                told = True
                if not self._limits.reached:
                    self._narrator.notice(source)
                self._team.notice(source)
                workers.stop()
                heard_at = time.monotonic()
            if self._narrator.listen():
                heard_at = time.monotonic()
            elif told and time.monotonic() - heard_at >= self._narrator.stuck_s():
                self._narrator.warned(
                    "the workers were asked to stop, told nothing since, and are killed as stuck"
                )
                workers.kill()
            workers.wait(POLL_S)
        self._narrator.listen()
        return exit_code

    def _settle(self, job: Job, exit_code: int, notice: Notice) -> ExitCode:
        """What the workers' outcome means for the run; no outcome means that they were killed or broke."""
        outcome = Outcome.model_validate_json(job.outcome.read_text()) if job.outcome.exists() else None
        exit_code, outcome = self._team.ended(exit_code, outcome)
        if self._team.node.rank:
            return ExitCode.RECOVER  # node 0 says what it really is
        if outcome and outcome.status == "user_error":
            raise RecipeError(outcome.message, hint=outcome.hint)
        if outcome and outcome.status == "no_room":
            raise NoRoom(outcome.message, hint=outcome.hint)
        if outcome and outcome.status == "unavailable":
            raise _ModelUnavailable(outcome.message, hint=outcome.hint)
        if outcome and outcome.status == "done" and (model := final(self._bucket)):
            self._narrator.done(model, self._bucket.uri)
            self._narrator.committing()
            export.complete(self._bucket, model)
            return ExitCode.DONE
        if outcome and outcome.status == "preempted":
            return self._gone(outcome.message)
        if broken := self._team.broken:
            self._narrator.failed(broken, ExitCode.RECOVER)
            return ExitCode.RECOVER
        if outcome is None and (notice.given or self._team.noticed):
            return self._gone("before the workers could save")
        return self._crashed(exit_code)

    def _gone(self, where: str) -> ExitCode:
        """The machine goes, and another one goes on; or the run's limit is used up, and none does."""
        if self._limits.reached:
            self._limits.stopped(where)
            return ExitCode.LIMIT
        self._narrator.preempted(where)
        return ExitCode.RECOVER

    def _crashed(self, exit_code: int) -> ExitCode:
        """A worker that a signal killed is worth another try, unless the last tries got nowhere either."""
        name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        fruitless = run_record.fruitless_attempts(self._bucket, self._attempt.number)
        code = ExitCode.RECOVER if exit_code < 0 and fruitless < MAX_FRUITLESS else ExitCode.BUG
        tries = f"; {fruitless} attempts in a row before it committed nothing" if fruitless else ""
        self._narrator.failed(f"the workers died of {name} and left no outcome{tries}", code)
        return code


def shelf_for(
    recipe: Recipe, planned: Fit, checkpoints: str, *, run_id: str, attempt: int
) -> ReferenceCache | None:
    """None if the run computes no log-probabilities beforehand.

    Raises:
        BucketError, Unavailable: as `open_shelf`.
    """
    if planned.reference != "precomputed":
        return None
    return open_shelf(checkpoints, reference_key(recipe), run_id=run_id, attempt=attempt)


class RunRequest(BaseModel):
    """A run, where it is kept, and what it may take."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    notes: tuple[str, ...] = ()
    checkpoints: str
    """URI of the folder of runs: gs://, s3:// or a path."""
    run_id: str
    program: str = PROGRAM
    work: Path
    """Folder of this machine for the run's attempts: staging, restored checkpoints."""
    staging: Wanted = "auto"
    tmpfs: Path = TMPFS
    """Where memory can be written to as files."""
    limits: Limits = Limits()

    def digest(self) -> str:
        """Of what all nodes of a run must agree on."""
        words = f"{self.checkpoints}\n{self.run_id}\n{self.recipe.digest()}"
        return xxhash.xxh3_128_hexdigest(words.encode())

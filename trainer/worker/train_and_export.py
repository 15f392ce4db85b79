"""The part that all training methods share: build the trainer, start or resume, train, export, report the outcome."""

from __future__ import annotations

import logging
from typing import Any

from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SchedulerType

from trainer.errors import RecipeError
from trainer.job import Job, Outcome
from trainer.worker import engine, trackers
from trainer.worker.callback import Progress
from trainer.worker.checkpoint import identity
from trainer.worker.checkpoint.identity import Identity
from trainer.worker.data import TokenizedDataset
from trainer.worker.export import export
from trainer.worker.model_source import Base
from trainer.worker.sources import DatasetRows
from trainer.worker.supervisor_channel import Channel

log = logging.getLogger(__name__)


class EvaluationInterrupted(Exception):
    """A preemption notice interrupted an evaluation."""


class InterruptibleEvaluation:
    """A mixin for a TRL trainer: a preemption notice interrupts an evaluation.

    An evaluation can take minutes, longer than the notice period. When it is interrupted, its step is saved, and
    the next attempt begins with the evaluation (`eval_on_start`). The result is exact: an evaluation draws its random
    numbers before its first batch, so the saved random state is the one after an evaluation, and Transformers restores
    that state after the evaluation at the start.
    """

    progress: Progress
    """Set before `train()`."""

    def prediction_step(self: Any, *arguments: Any, **named: Any) -> Any:
        if (
            self.is_in_train
            and not _result_needed(self.args)
            and self.progress.must_stop(self.args, self.state)
        ):
            raise EvaluationInterrupted
        return super().prediction_step(*arguments, **named)  # type: ignore[misc]

    def evaluate(self: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        """Return the metrics, or an empty dict if the evaluation was interrupted.

        Raises:
            EvaluationInterrupted: no step was taken since the start, so there is nothing to save.
        """
        try:
            found: dict[str, float] = super().evaluate(*arguments, **named)  # type: ignore[misc]
        except EvaluationInterrupted:
            if self.state.global_step == self._initial_global_step:
                raise
            log.info("the evaluation of step %d is interrupted by the notice", self.state.global_step)
            self.progress.cut_evaluation(self.state, self.control)
            self.model.train()  # by this mode TRL chooses the sums to log; the evaluation's are incomplete
            return {}
        return found


def check_test_rows(job: Job, rows: DatasetRows) -> None:
    """Raise `RecipeError` if the recipe asks for evaluations but has no test rows."""
    if job.recipe.trainer_args.get("eval_strategy", "no") != "no" and not rows.test:
        raise RecipeError(
            f"`eval_strategy: {job.recipe.trainer_args['eval_strategy']}`, but there are no test rows",
            hint="add `test_datasets` or `test_split_size` to `dataset_mixture`",
        )


def build(
    trainer_class: Any,
    args: Any,
    job: Job,
    train: TokenizedDataset,
    test: TokenizedDataset | None,
    **settings: Any,
) -> Any:
    """Return a TRL trainer of tokenized data.

    `args` must be made before the model is loaded, because ZeRO 3 partitions the model while it loads.

    Raises:
        RecipeError: TRL rejects the combination of the recipe's settings.
    """
    try:
        trainer = trainer_class(
            args=args, train_dataset=train.dataset, eval_dataset=test.dataset if test else None, **settings
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"TRL rejects the recipe: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.order = (job.recipe, train.fingerprint)
    return trainer


def finish(trainer: Any, base: Base, job: Job, channel: Channel, about: Identity) -> Outcome:
    """Start or resume the training, and export the model if the training reaches its end.

    Raises:
        UserError: the checkpoint is incomplete, or belongs to another run.
    """
    if job.resume_from:
        trainer.origin = theirs = identity.check(job.resume_from, about)
        # For a recipe, `eval_on_start` means the start of the run, not the start of each attempt.
        trainer.args.eval_on_start = theirs.evaluation_due
    trainer.identity = about
    trackers.prepare(trainer, job)
    trainer.progress = progress = Progress(job, channel, about, samples=len(trainer.train_dataset))
    trainer.add_callback(progress)
    if job.resume_from and identity.at_last_step(job.resume_from):
        channel.training_begins()
        log.info("training was finished when this checkpoint was saved: only the export of the model remains")
        step = identity.step(job.resume_from)
        trainer.load_only(job.resume_from)  # train() would take one more step
    else:
        try:
            trainer.train(resume_from_checkpoint=str(job.resume_from) if job.resume_from else None)
        except EvaluationInterrupted:
            at = trainer.state.global_step
            message = f"at step {at}, which is saved" if at else "before the first step"
            return Outcome(status="preempted", message=message)
        step = trainer.state.global_step
    if progress.stopped_at is not None:
        return Outcome(status="preempted", message=f"at step {progress.stopped_at}, which is saved")
    weights = engine.whole_weights(trainer, job.fit)  # on every rank, because it gathers
    if trainer.is_world_process_zero():
        export(trainer.model, trainer.processing_class, base, job, step=step, about=about, weights=weights)
    return Outcome(status="done")


def _result_needed(args: Any) -> bool:
    """Return whether the result of an evaluation decides the following steps."""
    return bool(args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU)

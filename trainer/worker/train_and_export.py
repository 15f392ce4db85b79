"""What SFT and DPO do alike around their trainer: go on or begin, train, export, say how it ended."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from trainer.errors import RecipeError
from trainer.job import Job, Outcome
from trainer.worker import checkpoint_identity, engine, trackers
from trainer.worker.callback import Progress
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.data import TokenizedDataset
from trainer.worker.export import export
from trainer.worker.interruptible_evaluation import EvaluationInterrupted
from trainer.worker.model_source import Base
from trainer.worker.sources import DatasetRows
from trainer.worker.supervisor_channel import Channel

log = logging.getLogger(__name__)


def check_test_rows(job: Job, rows: DatasetRows) -> None:
    """Raise `RecipeError` if the recipe wants evaluations of nothing."""
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
    """A TRL trainer of our tokens; `args` are made before the model, which ZeRO 3 cuts while it is loaded.

    Raises:
        RecipeError: TRL finds that the recipe's settings do not go together.
    """
    try:
        trainer = trainer_class(
            args=args, train_dataset=train.dataset, eval_dataset=test.dataset if test else None, **settings
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"TRL refuses the recipe: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.order = (job.recipe, train.fingerprint)
    return trainer


def finish(trainer: Any, base: Base, job: Job, channel: Channel, about: Identity) -> Outcome:
    """Train from where the run is to its end or a stop, and export the model if it is the end.

    Raises:
        UserError: the checkpoint is incomplete, or of another run.
    """
    if job.resume_from:
        theirs = checkpoint_identity.check(job.resume_from, about)
        trainer.goes_on_from(theirs, about)
        trainer.args.eval_on_start = (
            theirs.evaluation_due
        )  # a recipe means the run's start, not each attempt's
    trackers.prepare(trainer, job)
    trainer.progress = progress = Progress(job, channel, about, samples=len(trainer.train_dataset))
    trainer.add_callback(progress)
    # A third of what a save to tmpfs costs; the bucket's own checksums are what a restore believes.
    torch.serialization.set_crc32_options(compute_crc32=False)
    if job.resume_from and checkpoint_identity.at_last_step(job.resume_from):
        channel.training_begins()
        log.info("the checkpoint is the last step's: only the export is left")
        # train() would take one step more. The same loader that it uses, so the same weights.
        step = checkpoint_identity.step(job.resume_from)
        engine.load_only(trainer, job.resume_from, job.fit, steps=step)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(job.resume_from) if job.resume_from else None)
        except EvaluationInterrupted:
            at = trainer.state.global_step
            return Outcome(
                status="preempted", message=f"at step {at}, which is saved" if at else "before the first step"
            )
        step = trainer.state.global_step
    if progress.stopped_at is not None:
        return Outcome(status="preempted", message=f"at step {progress.stopped_at}, which is saved")
    weights = engine.whole_weights(trainer, job.fit)
    if trainer.is_world_process_zero():
        export(trainer.model, trainer.processing_class, base, job, step=step, about=about, weights=weights)
    return Outcome(status="done")

"""Supervised fine-tuning: the model learns to reproduce the texts of the data."""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from trainer.job import Job, Outcome
from trainer.worker import chat_template, data, model, model_source, sources, train_and_export
from trainer.worker.arguments import training_arguments
from trainer.worker.checkpoint.identity import identity
from trainer.worker.checkpoint.trainer_mixin import CheckpointMixin
from trainer.worker.sampling import DeterministicOrderMixin
from trainer.worker.supervisor_channel import Channel
from trainer.worker.train_and_export import InterruptibleEvaluation


class OrderedSFTTrainer(DeterministicOrderMixin, CheckpointMixin, InterruptibleEvaluation, SFTTrainer):
    """An `SFTTrainer` with our order of samples. It leaves data with `input_ids` and `labels` unchanged."""


def train(job: Job, channel: Channel) -> Outcome:
    """Train with SFT, and export the model.

    Raises:
        UserError: the recipe, the data, the model or the machine cannot be used.
    """
    recipe = job.recipe

    # Data and tokenizer
    rows = sources.read(recipe)
    train_and_export.check_test_rows(job, rows)
    base = model_source.locate(job, rows.train)
    tokenizer = chat_template.load_tokenizer(base.path, recipe)
    train_tokens = data.for_sft(rows.train, tokenizer, recipe, "training")
    test_tokens = data.for_sft(rows.test, tokenizer, recipe, "test") if rows.test else None
    del rows  # rows of a file are all in memory, on every rank, and are not needed again

    # Model
    args = training_arguments(SFTConfig, job)
    policy = model.load(base, recipe, job.fit)
    about = identity(job, train_tokens, model.digest(policy, recipe))

    # Training
    trainer = train_and_export.build(
        OrderedSFTTrainer,
        args,
        job,
        train_tokens,
        test_tokens,
        model=policy,
        processing_class=tokenizer,
        peft_config=model.lora(recipe),
    )
    return train_and_export.finish(trainer, base, job, channel, about)

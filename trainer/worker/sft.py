"""Supervised fine-tuning: the model learns to say what the data say."""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from trainer.job import Job, Outcome
from trainer.worker import chat, data, model, sources, training
from trainer.worker.arguments import training_arguments
from trainer.worker.channel import Channel
from trainer.worker.engine import Sharded
from trainer.worker.evaluation import GivesWay
from trainer.worker.order import Ordered
from trainer.worker.reshard.resharded import Resharded
from trainer.worker.resume import identity


class OrderedSFTTrainer(Ordered, Sharded, Resharded, GivesWay, SFTTrainer):  # type: ignore[misc]
    """An `SFTTrainer` in our order. It leaves data that have `input_ids` and `labels` as they are."""


def train(job: Job, channel: Channel) -> Outcome:
    """Raises `UserError` for what the user can mend."""
    recipe = job.recipe

    # Data and tokenizer
    rows = sources.read(recipe)
    training.check_test_rows(job, rows)
    base = model.locate(job, rows.train)
    tokenizer = chat.load_tokenizer(base.path, recipe)
    train_tokens = data.for_sft(rows.train, tokenizer, recipe, "training")
    test_tokens = data.for_sft(rows.test, tokenizer, recipe, "test") if rows.test else None
    del rows  # of a file they are all in memory, of every rank, and none is looked at again

    # Model
    args = training_arguments(SFTConfig, job)
    policy = model.load(base, recipe, job.fit)
    about = identity(job, train_tokens, model.digest(policy, recipe))

    # Training
    trainer = training.build(
        OrderedSFTTrainer,
        args,
        job,
        train_tokens,
        test_tokens,
        model=policy,
        processing_class=tokenizer,
        peft_config=model.lora(recipe),
    )
    return training.finish(trainer, base, job, channel, about)

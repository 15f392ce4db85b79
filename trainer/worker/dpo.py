"""Direct preference optimization (arXiv:2305.18290): the model learns which of two answers to prefer."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer

from trainer.job import Job, Outcome
from trainer.worker import chat, data, model, sources, training
from trainer.worker.channel import Channel
from trainer.worker.resume import identity


class PreparedDPOTrainer(DPOTrainer):
    """A `DPOTrainer` of data that are tokenised already.

    TRL 1.16 tokenises always: it knows no prompt length, and drops pairs without a word. `SFTTrainer` leaves
    tokenised data alone; this does the same.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def train(job: Job, channel: Channel) -> Outcome:
    """Raises `UserError` for what the user can mend."""
    recipe = job.recipe

    # Data and tokenizer
    rows = sources.read(recipe)
    training.check_test_rows(job, rows)
    base = model.locate(job, rows.train)
    tokenizer = chat.load_tokenizer(base.path, recipe)
    train_tokens = data.for_dpo(rows.train, tokenizer, recipe, "training")
    test_tokens = data.for_dpo(rows.test, tokenizer, recipe, "test") if rows.test else None

    # Policy and reference, both from the base: a checkpoint is only ever loaded into the policy.
    # With LoRA the reference is the policy without its adapter.
    policy = model.load(base, recipe, job.fit)
    about = identity(job, train_tokens, model.digest(policy))
    lora = model.lora(recipe)
    in_memory = lora is None and not recipe.trainer_args.get("precompute_ref_log_probs")
    reference = model.load(base, recipe, job.fit, trained=False) if in_memory else None

    # Training
    trainer = training.build(
        PreparedDPOTrainer,
        DPOConfig,
        job,
        train_tokens,
        test_tokens,
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return training.finish(trainer, base, job, channel, about)

"""Direct preference optimization (arXiv:2305.18290): the model learns which of two answers to prefer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from trl import DPOConfig, DPOTrainer

from trainer.job import Job, Outcome
from trainer.worker import chat, data, model, sources, training
from trainer.worker.arguments import training_arguments
from trainer.worker.channel import Channel
from trainer.worker.engine import Sharded
from trainer.worker.order import Ordered
from trainer.worker.reshard.resharded import Resharded
from trainer.worker.resume import identity


class PreparedDPOTrainer(Ordered, Sharded, Resharded, DPOTrainer):
    """A `DPOTrainer` of data that are tokenised already, in our order, and of one loss on every split.

    TRL 1.16 tokenises always: it knows no prompt length, and drops pairs without a word. `SFTTrainer` leaves
    tokenised data alone; this does the same.
    """

    loss_types: list[str]
    loss_weights: list[float]
    mean_tokens: float
    """Of the chosen answers of a micro batch, over the global batch."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Counts the answers' tokens of the whole global batch, over micro batches and ranks."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if "sft" in self.loss_types:
            tokens = sum(chosen_tokens(batch) for batch in batches).to(self.args.device)
            if self.args.world_size > 1:
                dist.all_reduce(tokens)
            self.mean_tokens = tokens.item() / (len(batches) * self.args.world_size)
        return batches, items

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """The loss `sft` is the mean over a micro batch's tokens: weighed by how many it has, the mean over micro
        batches and ranks is the one over the global batch's tokens, whatever it was dealt to.
        """
        said = self.loss_weights
        if self.model.training and "sft" in self.loss_types:
            share = chosen_tokens(inputs).item() / self.mean_tokens
            self.loss_weights = [
                weight * share if kind == "sft" else weight
                for kind, weight in zip(self.loss_types, said, strict=True)
            ]
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.loss_weights = said


def chosen_tokens(inputs: Any) -> Any:
    """Of the chosen answers of a micro batch, which holds them before the rejected, as they are predicted."""
    chosen, _ = inputs["completion_mask"][..., 1:].chunk(2, dim=0)  # (pairs, sequence - 1)
    return chosen.sum()


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

    args = training_arguments(DPOConfig, job)
    # Policy and reference, both from the base: a checkpoint is only ever loaded into the policy.
    # With LoRA the reference is the policy without its adapter.
    policy = model.load(base, recipe, job.fit)
    about = identity(job, train_tokens, model.digest(policy, recipe))
    lora = model.lora(recipe)
    in_memory = lora is None and not recipe.trainer_args.get("precompute_ref_log_probs")
    reference = model.load(base, recipe, job.fit, trained=False) if in_memory else None

    # Training
    trainer = training.build(
        PreparedDPOTrainer,
        args,
        job,
        train_tokens,
        test_tokens,
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return training.finish(trainer, base, job, channel, about)

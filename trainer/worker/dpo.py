"""Direct preference optimization (arXiv:2305.18290): the model learns which of two answers to prefer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import trl.trainer.dpo_trainer
from trl import DPOConfig, DPOTrainer

from trainer.job import Job, Outcome
from trainer.worker import (
    chat_template,
    data,
    fsdp,
    model,
    model_source,
    reference_logps,
    sources,
    train_and_export,
)
from trainer.worker.arguments import training_arguments
from trainer.worker.checkpoint_identity import identity
from trainer.worker.engine import ShardedCheckpointMixin
from trainer.worker.reference_logps import Reference
from trainer.worker.reshard.trainer_mixin import ReshardingMixin
from trainer.worker.sampling import DeterministicOrderMixin
from trainer.worker.supervisor_channel import Channel
from trainer.worker.train_and_export import InterruptibleEvaluation


class PreparedDPOTrainer(
    DeterministicOrderMixin, ShardedCheckpointMixin, ReshardingMixin, InterruptibleEvaluation, DPOTrainer
):
    """A `DPOTrainer` of data that are tokenised already, in our order, and of one loss on every split.

    TRL 1.16 tokenises always: it knows no prompt length, and drops pairs without a word. `SFTTrainer` leaves
    tokenised data alone; this does the same.
    """

    loss_types: list[str]
    loss_weights: list[float]
    mean_tokens: float
    """Of the chosen answers of a micro batch, over the global batch."""

    def __init__(self, *, reference: Reference | None, **settings: Any) -> None:
        self.reference = reference
        with _as_wanted(has_reference=reference is not None):
            super().__init__(**settings)

    def _precompute_ref_logps(self, dataset: Any, name: str, _batch_size: int) -> Any:
        """TRL keeps them in this machine's cache of data sets, by a hash of every weight."""
        if self.reference is None:
            raise RuntimeError("TRL asks for log-probabilities that the fit does not have computed")
        return self.reference.add_to(self, dataset, name)

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


@contextmanager
def _as_wanted(*, has_reference: bool) -> Iterator[None]:
    """What TRL does at its start and we do otherwise.

    Its hash of all weights in float32, a minute of each start for 7B, names a cache that is not used here. Under FSDP it
    loads a second model for the reference's pass, which `fsdp.frozen` does without; of a second model that is wanted it
    makes one unit.
    """
    ours = {"hash_module": lambda _model: "", "prepare_fsdp": fsdp.layer_by_layer}
    if has_reference:
        ours["create_model_from_path"] = lambda *_, **__: None
    theirs = {name: getattr(trl.trainer.dpo_trainer, name) for name in ours}
    vars(trl.trainer.dpo_trainer).update(ours)
    try:
        yield
    finally:
        vars(trl.trainer.dpo_trainer).update(theirs)


def chosen_tokens(inputs: Any) -> Any:
    """Of the chosen answers of a micro batch, which holds them before the rejected, as they are predicted."""
    chosen, _ = inputs["completion_mask"][..., 1:].chunk(2, dim=0)  # (pairs, sequence - 1)
    return chosen.sum()


def train(job: Job, channel: Channel) -> Outcome:
    """Raises `UserError` for what the user can mend."""
    recipe = job.recipe

    # Data and tokenizer
    rows = sources.read(recipe)
    train_and_export.check_test_rows(job, rows)
    base = model_source.locate(job, rows.train)
    tokenizer = chat_template.load_tokenizer(base.path, recipe)
    train_tokens = data.for_dpo(rows.train, tokenizer, recipe, "training")
    test_tokens = data.for_dpo(rows.test, tokenizer, recipe, "test") if rows.test else None
    del rows  # of a file they are all in memory, of every rank, and none is looked at again

    args = training_arguments(DPOConfig, job)
    # The reference is the policy before its first step: computed then and kept, or the policy without its adapter.
    # Only where the recipe wants it so it is a second model; a checkpoint is only ever loaded into the policy.
    policy = model.load(base, recipe, job.fit)
    about = identity(job, train_tokens, model.digest(policy, recipe))
    kept = (
        Reference(
            job, channel, reference_logps.about(job, train_tokens, about.model), train_tokens, test_tokens
        )
        if job.fit.reference == "precomputed"
        else None
    )
    second = model.load(base, recipe, job.fit, trained=False) if job.fit.reference == "model" else None

    # Training
    trainer = train_and_export.build(
        PreparedDPOTrainer,
        args,
        job,
        train_tokens,
        test_tokens,
        model=policy,
        ref_model=second,
        reference=kept,
        processing_class=tokenizer,
        peft_config=model.lora(recipe),
    )
    if kept:
        kept.keep()
        about = about.model_copy(update={"reference": kept.digest})
    return train_and_export.finish(trainer, base, job, channel, about)

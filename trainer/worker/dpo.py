"""Direct preference optimization (arXiv:2305.18290): the model learns which of two answers is better."""

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
from trainer.worker.checkpoint.identity import identity
from trainer.worker.checkpoint.trainer_mixin import CheckpointMixin
from trainer.worker.reference_logps import Reference
from trainer.worker.sampling import DeterministicOrderMixin
from trainer.worker.supervisor_channel import Channel
from trainer.worker.train_and_export import InterruptibleEvaluation


class PreparedDPOTrainer(DeterministicOrderMixin, CheckpointMixin, InterruptibleEvaluation, DPOTrainer):
    """A `DPOTrainer` for tokenized data, with our order of samples, and with the same loss on every split of the batch.

    TRL 1.16 always tokenizes: it has no prompt length, and silently drops pairs. `SFTTrainer` leaves tokenized data
    unchanged, and this class does the same.
    """

    loss_types: list[str]
    loss_weights: list[float]
    mean_tokens: float
    """Tokens of the chosen answers in an average micro batch of the current global batch."""

    def __init__(self, *, reference: Reference | None, **settings: Any) -> None:
        self.reference = reference
        with _patched_trl(has_reference=reference is not None):
            super().__init__(**settings)

    def _precompute_ref_logps(self, dataset: Any, name: str, _batch_size: int) -> Any:
        """Add the cached log-probabilities. TRL's own cache is local, and is named by a hash of all weights."""
        if self.reference is None:
            raise RuntimeError(
                "TRL requests reference log-probabilities, but the fit does not precompute them"
            )
        return self.reference.add_to(self, dataset, name)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count the tokens of the chosen answers in the global batch, over all micro batches and ranks."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if "sft" in self.loss_types:
            tokens = sum(chosen_tokens(batch) for batch in batches).to(self.args.device)
            if self.args.world_size > 1:
                dist.all_reduce(tokens)
            self.mean_tokens = tokens.item() / (len(batches) * self.args.world_size)
        return batches, items

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """Weight the loss `sft` by the token count of the micro batch.

        TRL's loss `sft` is the mean over the tokens of a micro batch. With this weight, the mean over micro batches
        and ranks is the mean over the tokens of the global batch, however the batch is split.
        """
        weights = self.loss_weights
        if self.model.training and "sft" in self.loss_types:
            share = chosen_tokens(inputs).item() / self.mean_tokens
            self.loss_weights = [
                weight * share if kind == "sft" else weight
                for kind, weight in zip(self.loss_types, weights, strict=True)
            ]
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.loss_weights = weights


@contextmanager
def _patched_trl(*, has_reference: bool) -> Iterator[None]:
    """Replace functions of TRL's module while the trainer is built.

    `hash_module` hashes all weights in float32, which takes a minute for 7B, to name a cache that is not used here.
    `create_model_from_path` would load a second model for the reference under FSDP; `fsdp.frozen` needs none.
    `prepare_fsdp` would make a single FSDP unit of a second model; it is sharded layer by layer instead.
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
    """Count the predicted tokens of the chosen answers, which are the first half of a micro batch."""
    chosen, _ = inputs["completion_mask"][..., 1:].chunk(2, dim=0)  # (pairs, sequence - 1)
    return chosen.sum()


def train(job: Job, channel: Channel) -> Outcome:
    """Train with DPO, and export the model.

    Raises:
        UserError: the recipe, the data, the model or the machine cannot be used.
    """
    recipe = job.recipe

    # Data and tokenizer
    rows = sources.read(recipe)
    train_and_export.check_test_rows(job, rows)
    base = model_source.locate(job, rows.train)
    tokenizer = chat_template.load_tokenizer(base.path, recipe)
    train_tokens = data.for_dpo(rows.train, tokenizer, recipe, "training")
    test_tokens = data.for_dpo(rows.test, tokenizer, recipe, "test") if rows.test else None
    del rows  # rows of a file are all in memory, on every rank, and are not needed again

    args = training_arguments(DPOConfig, job)
    # The reference is the policy before its first step, with cached log-probabilities, or the policy without its adapter.
    # It is a second model only if the recipe requests one. A checkpoint is loaded only into the policy.
    policy = model.load(base, recipe, job.fit)
    about = identity(job, train_tokens, model.digest(policy, recipe))
    cached = (
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
        reference=cached,
        processing_class=tokenizer,
        peft_config=model.lora(recipe),
    )
    if cached:
        cached.keep()
        about = about.model_copy(update={"reference": cached.digest})
    return train_and_export.finish(trainer, base, job, channel, about)

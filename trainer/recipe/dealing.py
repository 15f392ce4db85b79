"""Whether a recipe's loss lets a global batch be dealt to micro batches by length."""

from __future__ import annotations

from trainer.recipe.model import Recipe

OF_THE_MICRO_BATCH = {"aot", "aot_unpaired", "bco_pair"}
"""Losses of DPO that compare the pairs of a micro batch: rows are dealt to them in plain order, by chance. All others
are means over pairs (https://huggingface.co/docs/trl/dpo_trainer), or made so: `trainer.worker.dpo`."""


def may_sort(recipe: Recipe) -> bool:
    """Whether loss and gradient are the same however a global batch is dealt to micro batches.

    SFT divides by the learned tokens of the whole batch, over ranks and micro batches; DPO takes the mean over pairs,
    of which every micro batch has as many.
    """
    settings = recipe.trainer_args
    if recipe.method == "sft":
        return settings.get("average_tokens_across_devices") is not False
    losses = settings.get("loss_type") or "sigmoid"
    return not OF_THE_MICRO_BATCH & set([losses] if isinstance(losses, str) else losses)

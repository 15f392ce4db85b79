"""What a recipe asks of its fit, under the keys that it has for it."""

from __future__ import annotations

from trainer.memory import Attention, Engine, Reference
from trainer.recipe import Recipe


def reference_of(recipe: Recipe) -> Reference:
    """Where the log-probabilities of DPO's reference come from: a pass before training, or if the recipe says
    `precompute_ref_log_probs: false` a second model beside the policy; LoRA's are the policy's without its adapter,
    unless the recipe asks for the pass.
    """
    if not recipe.training_method.needs_reference:
        return "none"
    said = recipe.trainer_args.get("precompute_ref_log_probs")
    if recipe.is_lora:
        return "precomputed" if said else "adapters_off"
    return "model" if said is False else "precomputed"


def engine_of(recipe: Recipe, *, several: bool) -> Engine:
    """The engine that the recipe names, or whole replicas; of one process DDP is that process."""
    if recipe.engine in (None, "ddp"):
        return "ddp" if several else "single"
    return recipe.engine


def checkpointing_of(recipe: Recipe) -> bool | None:
    """Activation checkpointing as the recipe says it, by its new name or its old; None if it is silent."""
    for key in ("activation_checkpointing", "gradient_checkpointing"):
        if recipe.trainer_args.get(key) is not None:
            return bool(recipe.trainer_args[key])
    return None


def attention_of(recipe: Recipe) -> Attention | None:
    """The recipe's choice, as the kind that takes as much memory; None if it is silent."""
    wanted = recipe.model_args.get("attn_implementation")
    if not wanted:
        return None
    if wanted == "eager":
        return "eager"
    return "flash_attention_2" if "flash" in str(wanted) else "sdpa"

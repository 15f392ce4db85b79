"""The parts of the fit that a recipe's keys decide: reference, engine, checkpointing, attention."""

from __future__ import annotations

from trainer.memory import Attention, Engine, Reference
from trainer.recipe import Recipe


def reference_of(recipe: Recipe) -> Reference:
    """Return where the log-probabilities of DPO's reference come from.

    By default a pass before training computes them. With `precompute_ref_log_probs: false` a second model does, beside
    the policy. Under LoRA the policy without its adapter does, unless the recipe sets `precompute_ref_log_probs: true`.
    """
    if not recipe.training_method.needs_reference:
        return "none"
    precompute = recipe.trainer_args.get("precompute_ref_log_probs")
    if recipe.is_lora:
        return "precomputed" if precompute else "adapters_off"
    return "model" if precompute is False else "precomputed"


def engine_of(recipe: Recipe, *, several: bool) -> Engine:
    """Return the engine that the recipe names, by default DDP. DDP with one process is `single`."""
    if recipe.engine in (None, "ddp"):
        return "ddp" if several else "single"
    return recipe.engine


def checkpointing_of(recipe: Recipe) -> bool | None:
    """Return the recipe's activation checkpointing, by its new key or its old key; None if it sets neither."""
    for key in ("activation_checkpointing", "gradient_checkpointing"):
        if recipe.trainer_args.get(key) is not None:
            return bool(recipe.trainer_args[key])
    return None


def attention_of(recipe: Recipe) -> Attention | None:
    """Return the recipe's attention, as the kind that takes the same memory; None if the recipe does not set it."""
    wanted = recipe.model_args.get("attn_implementation")
    if not wanted:
        return None
    if wanted == "eager":
        return "eager"
    return "flash_attention_2" if "flash" in str(wanted) else "sdpa"

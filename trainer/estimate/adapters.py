"""What a recipe trains: all parameters, or LoRA's."""

from __future__ import annotations

from trainer.memory import Architecture
from trainer.memory.lora import lora_of
from trainer.recipe import Recipe


def lora(recipe: Recipe) -> bool:
    return bool(recipe.model_args.get("use_peft"))


def four_bit(recipe: Recipe) -> bool:
    return bool(recipe.model_args.get("load_in_4bit"))


def targets(recipe: Recipe, architecture: Architecture) -> tuple[str, ...]:
    """Projections of a layer that LoRA adapts; none without it."""
    adapter = lora_of(recipe, architecture)
    return tuple(adapter.targets) if adapter else ()


def adapter_parameters(recipe: Recipe, architecture: Architecture) -> int:
    """Of LoRA, over all layers; 0 without it."""
    adapter = lora_of(recipe, architecture)
    return adapter.parameters if adapter else 0


def trainable(recipe: Recipe, architecture: Architecture) -> int:
    """Parameters that have gradients."""
    return adapter_parameters(recipe, architecture) if lora(recipe) else architecture.parameters

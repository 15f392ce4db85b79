"""LoRA's matrices (arXiv:2106.09685): which projections have them, and how large they are."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from trainer.architecture.architecture import Architecture, Linear
from trainer.recipe import Recipe

DEFAULT_RANK, DEFAULT_DROPOUT = 16, 0.05
"""TRL's."""
DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's for all the kinds that we know:
https://github.com/huggingface/peft/blob/main/src/peft/utils/constants.py"""


class Lora(NamedTuple):
    """The adapter of a recipe."""

    rank: int
    targets: dict[str, Linear]
    dropout: float
    whole: int
    """Elements of the modules that are trained whole (`lora_modules_to_save`)."""
    layers: int

    @property
    def parameters(self) -> int:
        """Rank x (inputs + outputs) for each matrix (section 4.1), over all layers, and modules trained whole."""
        each = sum(self.rank * (linear.inputs + linear.outputs) for linear in self.targets.values())
        return self.layers * each + self.whole


def lora_of(recipe: Recipe, architecture: Architecture) -> Lora | None:
    """The recipe's adapter; None if it trains all weights."""
    settings = recipe.model_args
    if not recipe.is_lora:
        return None
    return Lora(
        rank=int(settings.get("lora_r") or DEFAULT_RANK),
        targets=_targets(settings.get("lora_target_modules"), architecture),
        dropout=float(settings.get("lora_dropout", DEFAULT_DROPOUT) or 0.0),
        whole=_whole(settings.get("lora_modules_to_save") or (), architecture),
        layers=architecture.num_hidden_layers,
    )


def _targets(wanted: Any, architecture: Architecture) -> dict[str, Linear]:
    """By the ends of their names, as PEFT matches a list; text is a regular expression of the whole name."""
    linears = architecture.linears
    if not wanted:
        return {name: linears[name] for name in DEFAULT_TARGETS}
    if wanted == "all-linear" or list(wanted) == ["all-linear"]:
        return dict(linears)
    if isinstance(wanted, str) or (len(wanted) == 1 and re.search(r"[^\w.]", wanted[0])):
        pattern = wanted if isinstance(wanted, str) else wanted[0]
        return {name: linear for name, linear in linears.items() if re.search(name, pattern)} or dict(linears)
    ends = {str(name).rpartition(".")[2] for name in wanted}
    return {name: linear for name, linear in linears.items() if name in ends}


def _whole(names: Any, architecture: Architecture) -> int:
    return sum(architecture.embedding_parameters for name in names if name in ("embed_tokens", "lm_head"))


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
    return adapter_parameters(recipe, architecture) if recipe.is_lora else architecture.parameters

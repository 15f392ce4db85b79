"""The LoRA adapter of a recipe (arXiv:2106.09685): which projections it adapts, and how many parameters it has."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from trainer.architecture.architecture import Architecture, Linear
from trainer.recipe import Recipe

DEFAULT_RANK, DEFAULT_DROPOUT = 16, 0.05
"""TRL's defaults."""
DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's default for every architecture that we support:
https://github.com/huggingface/peft/blob/main/src/peft/utils/constants.py"""


class Lora(NamedTuple):
    """The adapter of a recipe."""

    rank: int
    targets: dict[str, Linear]
    """The adapted projections of one layer, by name."""
    dropout: float
    whole: int
    """Elements of the modules that are trained in full (`lora_modules_to_save`)."""
    layers: int

    @property
    def parameters(self) -> int:
        """Trained parameters: rank x (inputs + outputs) per projection and layer (section 4.1), and `whole`."""
        per_layer = sum(self.rank * (linear.inputs + linear.outputs) for linear in self.targets.values())
        return self.layers * per_layer + self.whole


def lora_of(recipe: Recipe, architecture: Architecture) -> Lora | None:
    """Return the adapter of the recipe; None if the recipe trains all weights."""
    settings = recipe.model_args
    if not recipe.is_lora:
        return None
    return Lora(
        rank=int(settings.get("lora_r") or DEFAULT_RANK),
        targets=_match_targets(settings.get("lora_target_modules"), architecture),
        dropout=float(settings.get("lora_dropout", DEFAULT_DROPOUT) or 0.0),
        whole=_count_whole_modules(settings.get("lora_modules_to_save") or (), architecture),
        layers=architecture.num_hidden_layers,
    )


def list_targets(recipe: Recipe, architecture: Architecture) -> tuple[str, ...]:
    """Return the projections of a layer that LoRA adapts; an empty tuple without LoRA."""
    adapter = lora_of(recipe, architecture)
    return tuple(adapter.targets) if adapter else ()


def count_adapter_parameters(recipe: Recipe, architecture: Architecture) -> int:
    """Return the parameters of the adapter over all layers; 0 without LoRA."""
    adapter = lora_of(recipe, architecture)
    return adapter.parameters if adapter else 0


def count_trained_parameters(recipe: Recipe, architecture: Architecture) -> int:
    """Return the number of parameters that have gradients."""
    return count_adapter_parameters(recipe, architecture) if recipe.is_lora else architecture.parameters


def _match_targets(wanted: Any, architecture: Architecture) -> dict[str, Linear]:
    """Return the projections that `lora_target_modules` names.

    As in PEFT, a list is compared with the ends of the names, and a string is a regular expression.
    """
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


def _count_whole_modules(names: Any, architecture: Architecture) -> int:
    return sum(architecture.embedding_parameters for name in names if name in ("embed_tokens", "lm_head"))

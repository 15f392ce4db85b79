"""Adapters added to the base that they were trained on.

Of a quantised base that is its 4-bit numbers, not the weights that these were made of: added to the latter, what an
adapter has learnt is off by what quantisation took away (alignment-handbook issues 78 and 99).
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.fit import Fit
from trainer.recipe import Recipe
from trainer.worker import failures
from trainer.worker import model as models
from trainer.worker.model_source import Base

log = logging.getLogger(__name__)


def merge(
    base: Base, adapter: Path, recipe: Recipe, fit: Fit, into: Path, *, trained_on: str | None = None
) -> None:
    """Write base and adapter as one model: in bfloat16 if the base was quantised, else in the base's own dtype.

    On the CPU, a layer at a time in float32, so that there is one rounding.

    Args:
        base: what the adapter was trained on, to be loaded again.
        adapter: folder with `adapter_config.json` and its weights.
        recipe: says how the base is loaded.
        fit: of the run; where it ran does not matter.
        into: folder of the whole model.
        trained_on: digest of the weights that the adapter was trained on, if it is known.

    Raises:
        ModelError: the base is not the one that the adapter was trained on, or one of the two cannot be loaded.
    """
    import torch
    from peft import PeftModel

    there = fit.model_copy(update={"use_cpu": True, "engine": "single"})
    loaded = models.load(base, recipe, there, trained=False)
    quantised = recipe.is_quantised
    if trained_on:
        _check(loaded, recipe, base, trained_on)
    dtype = torch.bfloat16 if quantised else loaded.dtype
    whole = loaded.dequantize() if quantised else loaded
    try:
        both = PeftModel.from_pretrained(whole, str(adapter))
    except (OSError, ValueError, RuntimeError) as error:
        raise failures.explained(str(adapter), error) from error
    _merge_layers(both, dtype)
    merged = both.merge_and_unload().to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(into)


def _check(loaded: Any, recipe: Recipe, base: Base, trained_on: str) -> None:
    digest = models.digest(loaded, recipe)
    if digest == trained_on:
        return
    message = f"{base.name or base.path} has other weights ({digest}) than the adapter was trained on ({trained_on})"
    if recipe.is_quantised:  # a GPU's code for quantisation may round a number otherwise than a CPU's
        log.warning("%s", message)
        return
    raise ModelError(message, hint="name the `model_revision` that the run began with")


def _merge_layers(both: Any, dtype: Any) -> None:
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says at the end that all is merged already
        for module in both.modules():
            if isinstance(module, LoraLayer):
                module.float()
                module.merge()
                module.get_base_layer().to(dtype)

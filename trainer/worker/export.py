"""Writes the finished model as a folder that `from_pretrained` loads, and merges adapters into their base."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.fit import Fit
from trainer.job import Job
from trainer.recipe import Recipe
from trainer.staged import Staged, mark_staged
from trainer.worker import failures
from trainer.worker import model as models
from trainer.worker.chat_template import Tokenizer
from trainer.worker.checkpoint.identity import Identity
from trainer.worker.model_source import Base

log = logging.getLogger(__name__)
FOLDER = "final"


def export(  # noqa: PLR0913 (the parts of a finished model)
    model: Any,
    tokenizer: Tokenizer,
    base: Base,
    job: Job,
    *,
    step: int,
    about: Identity,
    weights: dict[str, Any] | None = None,
) -> Path:
    """Write `staging/final/` and mark it staged.

    A model that was trained in full is written whole. LoRA is written as an adapter that names the recipe's model.
    If the base exists only in this attempt's folder (`init: tiny`, or an adapter as the recipe's model), other people
    could not load such an adapter. The adapter is then merged into the base, and the whole model is written.

    Args:
        model: the trained model.
        tokenizer: is written beside the model.
        base: what the model was loaded from.
        job: names the staging folder and the recipe.
        step: the last step of the training.
        about: identity of the run, for the manifest.
        weights: the gathered weights of a sharded model; None if the model holds its own.
    """
    into = job.staging / FOLDER
    _write(model, base, job, about, {} if weights is None else {"state_dict": weights})
    tokenizer.save_pretrained(into)
    details = about.model_dump(mode="json")
    mark_staged(job.staging, Staged(folder=FOLDER, step=step, kind="final", details=details))
    return into


def _write(model: Any, base: Base, job: Job, about: Identity, weights: dict[str, Any]) -> None:
    from peft import PeftModel

    into = job.staging / FOLDER
    if not isinstance(model, PeftModel):
        model.save_pretrained(into, **weights)
        return
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name or base.path
    config.revision = job.recipe.model_args.get("model_revision")
    if base.name is not None:
        model.save_pretrained(into, **weights)
        return
    adapter = job.work / "adapter"
    model.save_pretrained(adapter, **weights)
    merge_adapter(base, adapter, job.recipe, job.fit, into, trained_on=about.model)


def merge_adapter(
    base: Base, adapter: Path, recipe: Recipe, fit: Fit, into: Path, *, trained_on: str | None = None
) -> None:
    """Write base and adapter as one model: in bfloat16 if the base was quantised, else in the base's own dtype.

    The sum is computed on the CPU in float32, one layer at a time, so it is rounded once.
    An adapter of a quantised base is added to the dequantised 4-bit numbers, because it was trained on them.
    Adding it to the original weights would be off by the quantisation error (alignment-handbook issues 78 and 99).

    Args:
        base: the model that the adapter was trained on, to be loaded again.
        adapter: folder with `adapter_config.json` and the adapter's weights.
        recipe: decides how the base is loaded.
        fit: the fit of the run; its engine and device do not matter here.
        into: folder of the merged model.
        trained_on: digest of the weights that the adapter was trained on, if it is known.

    Raises:
        ModelError: the base is not the one that the adapter was trained on, or one of the two cannot be loaded.
    """
    import torch
    from peft import PeftModel

    on_cpu = fit.model_copy(update={"use_cpu": True, "engine": "single"})
    loaded = models.load(base, recipe, on_cpu, trained=False)
    quantised = recipe.is_quantised
    if trained_on:
        _check_base(loaded, recipe, base, trained_on)
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


def _check_base(loaded: Any, recipe: Recipe, base: Base, trained_on: str) -> None:
    """Raise `ModelError` if the base has other weights than the adapter was trained on; warn for a quantised base."""
    digest = models.digest(loaded, recipe)
    if digest == trained_on:
        return
    message = f"{base.name or base.path} has other weights ({digest}) than the adapter was trained on ({trained_on})"
    if recipe.is_quantised:  # the quantisation kernels of a GPU and of a CPU may round a number differently
        log.warning("%s", message)
        return
    raise ModelError(message, hint="set `model_revision` to the revision that the run began with")


def _merge_layers(both: Any, dtype: Any) -> None:
    """Merge each LoRA layer in float32, and convert its base layer to `dtype`."""
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns at the end that all layers are merged already
        for module in both.modules():
            if isinstance(module, LoraLayer):
                module.float()
                module.merge()
                module.get_base_layer().to(dtype)

"""The arguments of a TRL trainer: from the recipe, from the fit, and fixed ones; and PyTorch's determinism settings."""

from __future__ import annotations

import os
from typing import Any

from trainer.errors import RecipeError
from trainer.fit import Fit
from trainer.fit.recipe_choices import checkpointing_of
from trainer.job import Job
from trainer.recipe import Recipe
from trainer.worker import engine

REFUSED = {
    "load_best_model_at_end": "checkpoints are removed from the machine as soon as they are committed",
    "save_only_model": "a checkpoint without the optimizer state cannot be resumed exactly",
    "auto_find_batch_size": "the micro batch and the accumulation are fixed before the start",
    "chat_template_path": "write the template itself, as `chat_template`",
    "eos_token": "data are tokenized before TRL could change it; set it in the model's tokenizer",
    "sync_ref_model": "no checkpoint holds the moving reference, so a recovery would not be exact",
}
"""Settings of TRL that cannot be used, and why."""


def compute_deterministically(recipe: Recipe) -> None:
    """Make PyTorch compute the same bits on the same machine; call it before the first computation.

    Many of the fastest GPU kernels add in a random order
    (https://docs.pytorch.org/docs/stable/notes/randomness.html). The one that every step runs is the backward pass of
    attention. Here each operation gets a kernel that adds in a fixed order, and an operation without one raises
    `RuntimeError`.

    With `full_determinism: true` Transformers also waits for each kernel. With `full_determinism: false` this
    function does nothing: the run uses the fastest kernels, and a recovered run may differ slightly from an
    undisturbed one.
    """
    if recipe.trainer_args.get("full_determinism") is False:
        return
    import torch

    # cuBLAS reads this when it starts. With a workspace of fixed size its results do not vary (see the address above).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by Transformers, for the package flash-attn
    # With `warn_only`, attention would keep its fast kernel: https://github.com/pytorch/pytorch/pull/182551
    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # our code never reads uninitialized memory
    torch.backends.cudnn.benchmark = False


def training_arguments(config_class: Any, job: Job) -> Any:
    """Return the `SFTConfig` or `DPOConfig` of a job, and start the engine that it names.

    Raises:
        RecipeError: TRL rejects the recipe's settings, or a setting would make recoveries inexact.
        UserError: the engine cannot run on this machine.
    """
    settings = dict(job.recipe.trainer_args)
    for key, reason in REFUSED.items():
        if settings.get(key):
            raise RecipeError(f"`{key}` cannot be used: {reason}", hint=f"remove `{key}` from the recipe")
    config = engine.config(job.recipe, job.fit, has_bf16=device_has_bf16(job.fit))
    settings = {**_defaults(settings, job.fit), **_fitted(job), **settings, **_owned(job)}
    settings |= engine.settings(config, job.fit)
    engine.start(job, config)
    try:
        arguments = config_class(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"TRL rejects the recipe's settings: {error}") from error
    if arguments.world_size != job.fit.processes:
        raise RuntimeError(  # the global batch would silently differ from the recipe's
            f"{arguments.world_size} processes were started, not the {job.fit.processes} of the fit"
        )
    return arguments


def _defaults(settings: dict[str, Any], fit: Fit) -> dict[str, Any]:
    """Return our defaults, which the recipe overrides. TRL's own default is bf16, even on hardware without it."""
    return {
        "bf16": device_has_bf16(fit) and not settings.get("fp16"),
        "report_to": "none",
        "per_device_eval_batch_size": fit.micro_batch,
        "ddp_find_unused_parameters": False,  # Transformers would search for them at every step if checkpointing is off
        "logging_nan_inf_filter": False,  # it would log a loss of NaN as 0
    }


def _fitted(job: Job) -> dict[str, Any]:
    """Return the fit's choices for settings that the recipe leaves open."""
    if checkpointing_of(job.recipe) is not None:
        return {}
    return {"gradient_checkpointing": job.fit.activation_checkpointing}


def _owned(job: Job) -> dict[str, Any]:
    """Return the arguments that override the recipe.

    Every step is logged, because an average over several steps would differ after a resume between them.
    """
    owned = {
        "output_dir": str(job.staging),
        "per_device_train_batch_size": job.fit.micro_batch,
        "gradient_accumulation_steps": job.fit.accumulation,
        "save_strategy": "steps",
        "save_total_limit": None,  # the supervisor applies retention in the bucket
        "logging_strategy": "steps",
        "logging_steps": 1,
        "disable_tqdm": True,
        "enable_jit_checkpoint": False,  # it saves in the middle of a step, and ranks would save at different steps
    }
    if job.fit.use_cpu:
        owned["dataloader_pin_memory"] = False
    method = job.recipe.training_method
    owned |= dict.fromkeys(method.disabled_settings, False)
    if method.needs_reference:
        owned["precompute_ref_log_probs"] = job.fit.reference == "precomputed"
    return owned


def device_has_bf16(fit: Fit) -> bool:
    """Return whether the device computes in bfloat16 at full speed. For a CPU it is False: bfloat16 is slow there."""
    import torch

    return (
        not fit.use_cpu
        and torch.cuda.is_available()
        and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    )

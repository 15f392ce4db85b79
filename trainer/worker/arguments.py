"""The recipe's settings as TRL takes them, and those that are the run's to decide."""

from __future__ import annotations

from typing import Any

from trainer.errors import RecipeError
from trainer.fit import Fit
from trainer.fit.recipe_choices import checkpointing_of
from trainer.job import Job
from trainer.worker import engine

REFUSED = {
    "load_best_model_at_end": "checkpoints leave the machine as soon as they are committed",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed exactly",
    "auto_find_batch_size": "the micro batch is decided before the start, with the accumulation",
    "chat_template_path": "write the template itself, as `chat_template`",
    "eos_token": "data are tokenised before TRL could change it; set it in the model's tokenizer",
    "sync_ref_model": "the moving reference is in no checkpoint, so a recovery would not be exact",
}
"""Settings of TRL that cannot be kept here, and why."""


def training_arguments(config_class: Any, job: Job) -> Any:
    """An `SFTConfig` or `DPOConfig`.

    Raises:
        RecipeError: TRL does not take the recipe's settings, or a recovery could not keep them.
        UserError: the engine cannot be had on this machine.
    """
    settings = dict(job.recipe.trainer_args)
    for key, reason in REFUSED.items():
        if settings.get(key):
            raise RecipeError(f"`{key}` cannot be used: {reason}", hint=f"take `{key}` out of the recipe")
    config = engine.config(job.recipe, job.fit, has_bf16=has_bf16(job.fit))
    settings = {**_defaults(settings, job.fit), **_fitted(job), **settings, **_owned(job)}
    settings |= engine.settings(config, job.fit)
    engine.start(job, config)
    try:
        arguments = config_class(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"TRL refuses the recipe's settings: {error}") from error
    if arguments.world_size != job.fit.processes:
        raise RuntimeError(  # would train with another global batch than the recipe's, in silence
            f"{arguments.world_size} processes were started, not the {job.fit.processes} of the fit"
        )
    return arguments


def _defaults(settings: dict[str, Any], fit: Fit) -> dict[str, Any]:
    """Where the recipe is silent. TRL's own default is bf16, even where the hardware has none."""
    return {
        "bf16": has_bf16(fit) and not settings.get("fp16"),
        "report_to": "none",
        "per_device_eval_batch_size": fit.micro_batch,
        "ddp_find_unused_parameters": False,  # Transformers looks for them at every step without checkpointing
        "logging_nan_inf_filter": False,  # it would write the loss of a broken step as 0
    }


def _fitted(job: Job) -> dict[str, Any]:
    """What the fit chose where the recipe is silent."""
    if checkpointing_of(job.recipe) is not None:
        return {}
    return {"gradient_checkpointing": job.fit.activation_checkpointing}


def _owned(job: Job) -> dict[str, Any]:
    """What no recipe decides. Every step is logged: averages over more do not come out of a resume equal."""
    owned = {
        "output_dir": str(job.staging),
        "per_device_train_batch_size": job.fit.micro_batch,
        "gradient_accumulation_steps": job.fit.accumulation,
        "save_strategy": "steps",
        "save_total_limit": None,  # retention is the bucket's
        "logging_strategy": "steps",
        "logging_steps": 1,
        "disable_tqdm": True,
        "enable_jit_checkpoint": False,  # it saves in mid-step, and no two ranks agree on which
    }
    if job.fit.use_cpu:
        owned["dataloader_pin_memory"] = False
    method = job.recipe.training_method
    owned |= dict.fromkeys(method.disabled_settings, False)
    if method.needs_reference:
        owned["precompute_ref_log_probs"] = job.fit.reference == "precomputed"
    return owned


def has_bf16(fit: Fit) -> bool:
    """Whether the device computes in bfloat16 at full speed; a CPU is never asked to unless the recipe says so."""
    import torch

    return (
        not fit.use_cpu
        and torch.cuda.is_available()
        and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    )

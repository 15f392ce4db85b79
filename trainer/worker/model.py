"""Loads the model that a run begins with, and computes the digest of its weights."""

from __future__ import annotations

import logging
import os
from typing import Any

import xxhash

from trainer.errors import RecipeError
from trainer.fit import Fit
from trainer.hardware import FLASH_ATTENTION_CAPABILITY
from trainer.memory.precision import half_precision, trains_in_float32
from trainer.recipe import Recipe
from trainer.worker.failures import explained
from trainer.worker.model_source import Base, dtype_name, hub_arguments

log = logging.getLogger(__name__)
FLASH_ATTENTION = "flash_attention_2"


def load(base: Base, recipe: Recipe, fit: Fit, *, trained: bool = True) -> Any:
    """Load a causal language model with its weights on the CPU, or on the GPU if it is quantised.

    If all weights are `trained` and mixed precision needs float32 masters, the weights are loaded in float32.

    Raises:
        ModelError: the model is missing, broken or gated.
        Unavailable: the Hub does not answer.
    """
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "dtype": "float32" if trained and _keeps_float32(recipe, fit) else dtype_name(recipe),
        "attn_implementation": attention(recipe, fit),
        **hub_arguments(recipe),
    }
    if quantization := quantization_config(recipe, dtype_name(recipe)):
        settings["quantization_config"] = quantization
        settings["device_map"] = {"": "cpu" if fit.use_cpu else int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, **settings)
    except Exception as error:  # a broken file surfaces as an error of one of many libraries
        raise explained(base.path, error) from error
    if quantization:
        keep_layout(model)
    return model


def _keeps_float32(recipe: Recipe, fit: Fit) -> bool:
    if fit.use_cpu:
        return False
    from trainer.worker.arguments import device_has_bf16

    has_half = half_precision(recipe, has_bf16=device_has_bf16(fit)) is not None
    return trains_in_float32(recipe, fit.engine, has_half=has_half)


def attention(recipe: Recipe, fit: Fit) -> str | None:
    """Return the recipe's choice or the fit's; `sdpa` if FlashAttention cannot run; None to let Transformers choose."""
    requested: str | None = recipe.model_args.get("attn_implementation")
    wanted = requested if requested or fit.use_cpu or fit.attention != FLASH_ATTENTION else FLASH_ATTENTION
    if wanted != FLASH_ATTENTION or (reason := _no_flash_attention(fit)) is None:
        return wanted
    log.info("attention is sdpa, not %s: %s", FLASH_ATTENTION, reason)
    return "sdpa" if requested else None


def _no_flash_attention(fit: Fit) -> str | None:
    import torch
    from transformers.utils import is_flash_attn_2_available

    if fit.use_cpu or not torch.cuda.is_available():
        return "there is no CUDA device"
    if fit.attention != FLASH_ATTENTION:
        return "it does not support float32"
    if torch.cuda.get_device_capability() < FLASH_ATTENTION_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    return None if is_flash_attn_2_available() else "the package flash-attn is not installed"


def lora(recipe: Recipe) -> Any:
    """Return the recipe's `LoraConfig`, or None if every weight is trained."""
    from trl import ModelConfig, get_peft_config

    try:
        return get_peft_config(ModelConfig(**recipe.model_args))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the recipe's LoRA settings cannot be used: {error}") from error


def digest(model: Any, recipe: Recipe) -> str:
    """Return an xxh3_128 digest of every weight's name and bytes; weights of ZeRO 3 are gathered one at a time.

    Weights are converted to half precision first, because engine and hardware decide whether they are loaded in half
    precision or in float32.
    """
    import torch

    is_float16 = recipe.trainer_args.get("fp16") or dtype_name(recipe) == "float16"
    half = torch.float16 if is_float16 else torch.bfloat16
    total = xxhash.xxh3_128()
    partitioned = {name: weight for name, weight in model.named_parameters() if hasattr(weight, "ds_id")}
    for name, stored in sorted(model.state_dict().items()):
        tensor = _gathered(partitioned[name]) if name in partitioned else stored
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.to(half) if tensor.is_floating_point() else tensor
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _gathered(weight: Any) -> Any:
    """Return a copy of a partitioned weight on the host; every rank must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([weight]):
        return weight.detach().cpu().clone()


def quantization_config(recipe: Recipe, dtype: str) -> Any:
    """Return the bitsandbytes config, or None. 4 bit means NormalFloat as in QLoRA (arXiv:2305.14314)."""
    if not recipe.is_quantised:
        return None
    if not recipe.is_lora:
        raise RecipeError("a quantised model cannot be trained in full", hint="add `use_peft: true`")
    from transformers import BitsAndBytesConfig

    if recipe.quantised_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.model_args.get("bnb_4bit_quant_type", "nf4"),
        bnb_4bit_use_double_quant=recipe.model_args.get("use_bnb_nested_quant", False),
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
        bnb_4bit_quant_storage=recipe.model_args.get("bnb_4bit_quant_storage"),
    )


def keep_layout(model: Any) -> None:
    """Stop bitsandbytes from repacking quantised layers in evaluations on a CPU with AVX512-BF16.

    The repacked layers have rounded constants and a product without gradient, so adapters below them would learn
    nothing until the next save (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

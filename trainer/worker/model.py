"""The model that a run begins with: found or made, loaded, described."""

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
    """A causal language model with its weights, on the CPU (quantised: where it is to run).

    One whose weights are all `trained` is in float32 where mixed precision needs it so.

    Raises:
        ModelError: missing, broken or gated.
        Unavailable: the Hub does not answer.
    """
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "dtype": "float32" if trained and _keeps_float32(recipe, fit) else dtype_name(recipe),
        "attn_implementation": attention(recipe, fit),
        **hub_arguments(recipe),
    }
    if quantization := config(recipe, dtype_name(recipe)):
        settings["quantization_config"] = quantization
        settings["device_map"] = {"": "cpu" if fit.use_cpu else int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, **settings)
    except Exception as error:  # a broken file surfaces as any of a dozen libraries' errors
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
    """The recipe's choice, or the fit's FlashAttention; `sdpa` where that cannot run; None leaves it to Transformers."""
    said: str | None = recipe.model_args.get("attn_implementation")
    wanted = said if said or fit.use_cpu or fit.attention != FLASH_ATTENTION else FLASH_ATTENTION
    if wanted != FLASH_ATTENTION or (reason := _no_flash_attention(fit)) is None:
        return wanted
    log.info("attention is sdpa, not %s: %s", FLASH_ATTENTION, reason)
    return "sdpa" if said else None


def _no_flash_attention(fit: Fit) -> str | None:
    import torch
    from transformers.utils import is_flash_attn_2_available

    if fit.use_cpu or not torch.cuda.is_available():
        return "there is no CUDA device"
    if fit.attention != FLASH_ATTENTION:
        return "it knows no float32"
    if torch.cuda.get_device_capability() < FLASH_ATTENTION_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    return None if is_flash_attn_2_available() else "the package flash-attn is not installed"


def lora(recipe: Recipe) -> Any:
    """The recipe's `LoraConfig`; None to train every weight."""
    from trl import ModelConfig, get_peft_config

    try:
        return get_peft_config(ModelConfig(**recipe.model_args))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the recipe's LoRA settings cannot be used: {error}") from error


def digest(model: Any, recipe: Recipe) -> str:
    """xxh3_128 over every weight's name and bytes; what ZeRO 3 has cut is gathered, a weight at a time.

    In half precision: whether weights are loaded in it or in float32 is the engine's to say, and the hardware's.
    """
    import torch

    is_float16 = recipe.trainer_args.get("fp16") or dtype_name(recipe) == "float16"
    half = torch.float16 if is_float16 else torch.bfloat16
    total = xxhash.xxh3_128()
    cut = {name: weight for name, weight in model.named_parameters() if hasattr(weight, "ds_id")}
    for name, kept in sorted(model.state_dict().items()):
        tensor = _gathered(cut[name]) if name in cut else kept
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.to(half) if tensor.is_floating_point() else tensor
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _gathered(weight: Any) -> Any:
    """A copy on the host; every rank has to ask for it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([weight]):
        return weight.detach().cpu().clone()


def config(recipe: Recipe, dtype: str) -> Any:
    """4-bit NormalFloat as in QLoRA (arXiv:2305.14314), its constants quantised too if asked for; or 8 bit, or None."""
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
    """On a CPU with AVX512-BF16 an evaluation would repack the layers for inference, in place: with rounded constants, and
    with a product that has no gradient, so that the adapters below would learn nothing until the next save
    (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

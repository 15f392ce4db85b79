"""A base model that bitsandbytes packs: how, and that it stays as it was packed."""

from __future__ import annotations

from typing import Any

from trainer.errors import RecipeError
from trainer.recipe import Recipe


def config(recipe: Recipe, dtype: str) -> Any:
    """4-bit NormalFloat as in QLoRA (arXiv:2305.14314), its constants quantised too if asked for; or 8 bit, or None."""
    if not (recipe.model_args.get("load_in_4bit") or recipe.model_args.get("load_in_8bit")):
        return None
    if not recipe.model_args.get("use_peft"):
        raise RecipeError("a quantised model cannot be trained in full", hint="add `use_peft: true`")
    from transformers import BitsAndBytesConfig

    if recipe.model_args.get("load_in_8bit"):
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

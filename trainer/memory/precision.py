"""Which numbers are kept in how many bytes: what the recipe says, as TRL, PEFT and DeepSpeed carry it out."""

from __future__ import annotations

from typing import Literal, NamedTuple

from trainer.architecture.architecture import Architecture
from trainer.memory.layout import Engine
from trainer.recipe import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BITS = 4 + 32 / 64
"""A 4-bit number, and a 32-bit constant for each block of 64 (QLoRA, arXiv:2305.14314, section 2)."""
NF4_DOUBLE_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""With the constants in 8 bits, and a 32-bit constant for 256 of them (QLoRA, section 3, "Double Quantization")."""
INT8_BITS = 8
"""LLM.int8 (arXiv:2208.07339); its constants, one for each row, are lost in the rounding."""


class Precision(NamedTuple):
    """Bytes of an element, on the device that trains."""

    compute: Dtype
    """Of matrix products, and of what they leave for the backward pass."""
    stream: int
    """Of the hidden states that run from layer to layer."""
    weights: int
    """Of the base model: trained if all is trained, else frozen; of its projections see `projection_bits`."""
    projection_bits: float
    """Of an element of the layers' projections, which 4-bit and 8-bit loading quantise."""
    trained: int
    """Of a trained weight."""
    gradients: int
    masters: int
    """Of the float32 copy beside a trained weight that is kept in half precision; 0 without one."""
    state: int
    """Of an element of an optimizer that keeps its state in the precision of what it steps."""
    autocast: bool
    """torch casts the inputs of matrix products to `compute`; DeepSpeed casts the model, and nothing after."""
    gathers_cast: bool = False
    """FSDP 2 keeps weights as they are and gathers them in `compute`, adapters too: their gradients come in it."""

    @property
    def computed(self) -> int:
        return BYTES[self.compute]

    @property
    def arriving(self) -> int:
        """Of a gradient, as the backward pass makes it."""
        return self.computed if self.gathers_cast else self.gradients

    @property
    def adapter(self) -> int:
        """Of a trained weight, as a forward pass without autocast has it."""
        return self.computed if self.gathers_cast else self.trained

    @property
    def casts(self) -> bool:
        """Whether weights are cast as they are used."""
        return self.autocast and self.weights > self.computed


def loaded_dtype(recipe: Recipe, architecture: Architecture) -> Dtype:
    """Of the weights as they are read; float32 is TRL's default, and what `auto` falls back to."""
    wanted = recipe.model_args.get("dtype")
    name = architecture.dtype if wanted == "auto" else wanted
    return "bfloat16" if name == "bfloat16" else "float16" if name == "float16" else "float32"


def half_precision(recipe: Recipe, *, has_bf16: bool) -> Dtype | None:
    """What matrix products are cast to; None if nothing is cast. Silence means bf16 where the device has it."""
    if recipe.trainer_args.get("fp16"):
        return "float16"
    wanted = recipe.trainer_args.get("bf16")
    return "bfloat16" if (has_bf16 if wanted is None else wanted) else None


def needs_bf16(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether the recipe cannot do without bf16 in hardware: it says so, or TRL does, of adapters over 4 or 8 bits."""
    said = bool(recipe.trainer_args.get("bf16")) or loaded_dtype(recipe, architecture) == "bfloat16"
    return said or recipe.is_quantised


def trains_in_float32(recipe: Recipe, engine: Engine, *, has_half: bool) -> bool:
    """Whether the weights are loaded in float32 whatever the recipe's `dtype` is.

    Mixed precision keeps the weights that are trained in float32 (arXiv:1710.03740, section 3.1): a step of 5e-7
    is lost in bf16's 8 bits. DeepSpeed makes those copies itself; one process, DDP and FSDP 2 have only the weights.
    """
    return has_half and not recipe.is_lora and engine not in ("zero2", "zero3")


def precision(
    recipe: Recipe, architecture: Architecture, engine: Engine, *, has_bf16: bool = True
) -> Precision:
    """Of a recipe under an engine."""
    half = half_precision(recipe, has_bf16=has_bf16)
    loaded = loaded_dtype(recipe, architecture)
    if engine in ("zero2", "zero3"):
        return _sharded(half or loaded)
    if engine == "fsdp2":
        return _gathered(recipe, half, loaded)
    if recipe.is_lora:
        return _adapter(recipe, half, loaded)
    weights: Dtype = "float32" if half else loaded
    size = BYTES[weights]
    compute = half or weights
    return Precision(compute, size, size, 8.0 * size, size, size, 0, size, autocast=half is not None)


def _sharded(compute: Dtype) -> Precision:
    """ZeRO: parameters and gradients in half precision, float32 masters and state (arXiv:1910.02054, section 3.1).

    Adapters too are cast to the base's dtype (https://github.com/huggingface/trl/issues/6089).
    """
    size = BYTES[compute]
    masters = 4 if size < 4 else 0
    return Precision(compute, size, size, 8.0 * size, size, size, masters, 4, autocast=False)


def _gathered(recipe: Recipe, half: Dtype | None, loaded: Dtype) -> Precision:
    """FSDP 2: what is trained stays in float32 and is its own master; whatever is gathered is cast first
    (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html, `MixedPrecisionPolicy`).
    """
    kept = BYTES["float32" if half and not recipe.is_lora else loaded]
    trained = 4 if recipe.is_lora else kept
    compute = half or loaded
    return Precision(
        compute=compute,
        stream=BYTES[compute],
        weights=kept,
        projection_bits=8.0 * kept,
        trained=trained,
        gradients=trained,
        masters=0,
        state=trained,
        autocast=False,
        gathers_cast=half is not None,
    )


def _adapter(recipe: Recipe, half: Dtype | None, loaded: Dtype) -> Precision:
    """LoRA's matrices are float32 over a base in half precision (PEFT's `autocast_adapter_dtype`); over a quantised
    base TRL makes them bf16, after QLoRA (arXiv:2305.14314, section 3).
    """
    base = BYTES[loaded]
    trained = 2 if recipe.is_quantised else 4
    compute = half or loaded
    return Precision(
        compute=compute,
        stream=base,
        weights=base,
        projection_bits=_projection_bits(recipe, base),
        trained=trained,
        gradients=trained,
        masters=0,
        state=trained,
        autocast=half is not None,
    )


def _projection_bits(recipe: Recipe, base: int) -> float:
    if recipe.quantised_bits == 8:
        return INT8_BITS
    if recipe.quantised_bits == 4:
        return NF4_DOUBLE_BITS if recipe.model_args.get("use_bnb_nested_quant") else NF4_BITS
    return 8.0 * base

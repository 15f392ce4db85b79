"""The dtype of each tensor of a run: what the recipe asks for, and how TRL, PEFT, DeepSpeed and FSDP2 apply it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from trainer.architecture.architecture import Architecture
from trainer.memory.layout import Engine
from trainer.recipe import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BITS = 4 + 32 / 64
"""Bits of a weight: 4, and one 32-bit constant per block of 64 weights (QLoRA, arXiv:2305.14314, section 2)."""
NF4_DOUBLE_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""The same with double quantization: the constants have 8 bits, and 256 of them share one 32-bit constant (QLoRA,
section 3)."""
INT8_BITS = 8
"""Bits of a weight under LLM.int8 (arXiv:2208.07339). Its constants, one per row, are too few to count."""


class Precision(NamedTuple):
    """Bytes per element of each kind of tensor, on the device that trains."""

    compute: Dtype
    """The dtype of matrix products, and of the tensors that they save for the backward pass."""
    stream: int
    """The hidden states between the layers."""
    weights: int
    """The base model, trained or frozen. For its projections see `projection_bits`."""
    projection_bits: float
    """Bits (not bytes) per element of the layers' projections, which 4-bit and 8-bit loading quantise."""
    trained: int
    """The trained weights."""
    gradients: int
    masters: int
    """The float32 copies of trained weights that are in half precision; 0 without such copies."""
    state: int
    """The optimizer state, for optimizers that keep it in the dtype of the weights that they step."""
    autocast: bool
    """Whether torch casts the inputs of matrix products to `compute`. DeepSpeed casts the model once instead."""
    gathers_cast: bool = False
    """Whether parameters, adapters included, are cast to `compute` when they are gathered, as FSDP2 does. Their gradients
    are in `compute` too."""

    @property
    def computed(self) -> int:
        """Bytes per element in `compute`."""
        return BYTES[self.compute]

    @property
    def arriving(self) -> int:
        """Bytes per element of a gradient when the backward pass makes it."""
        return self.computed if self.gathers_cast else self.gradients

    @property
    def adapter(self) -> int:
        """Bytes per element of a trained weight in a forward pass without autocast."""
        return self.computed if self.gathers_cast else self.trained

    @property
    def casts(self) -> bool:
        """Whether weights are cast at each use."""
        return self.autocast and self.weights > self.computed


def loaded_dtype(recipe: Recipe, architecture: Architecture) -> Dtype:
    """Return the dtype that the weights are loaded in. float32 is TRL's default, and the fallback of `auto`."""
    wanted = recipe.model_args.get("dtype")
    name = architecture.dtype if wanted == "auto" else wanted
    return "bfloat16" if name == "bfloat16" else "float16" if name == "float16" else "float32"


def half_precision(recipe: Recipe, *, has_bf16: bool) -> Dtype | None:
    """Return the dtype that matrix products are cast to; None if nothing is cast.

    A recipe without `bf16` and `fp16` uses bf16 where the device has it.
    """
    if recipe.trainer_args.get("fp16"):
        return "float16"
    wanted = recipe.trainer_args.get("bf16")
    return "bfloat16" if (has_bf16 if wanted is None else wanted) else None


def needs_bf16(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether the recipe needs a device with bf16: it asks for bf16, or TRL uses bf16 for adapters of a quantised base."""
    asked = bool(recipe.trainer_args.get("bf16")) or loaded_dtype(recipe, architecture) == "bfloat16"
    return asked or recipe.is_quantised


def trains_in_float32(recipe: Recipe, engine: Engine, *, has_half: bool) -> bool:
    """Whether the weights are loaded in float32, whatever `dtype` the recipe has.

    Mixed precision keeps trained weights in float32 (arXiv:1710.03740, section 3.1), because a step of 5e-7 is lost
    in the 8 bits of bf16. DeepSpeed makes float32 copies itself. One process, DDP and FSDP2 have no copies, so their
    weights have to be float32.
    """
    return has_half and not recipe.is_lora and engine not in ("zero2", "zero3")


def choose_precision(
    recipe: Recipe, architecture: Architecture, engine: Engine, *, has_bf16: bool = True
) -> Precision:
    """Return the bytes of each kind of tensor when this engine trains this recipe."""
    half = half_precision(recipe, has_bf16=has_bf16)
    loaded = loaded_dtype(recipe, architecture)
    if engine in ("zero2", "zero3"):
        return _zero_precision(half or loaded)
    if engine == "fsdp2":
        return _fsdp_precision(recipe, half, loaded)
    if recipe.is_lora:
        return _lora_precision(recipe, half, loaded)
    weights: Dtype = "float32" if half else loaded
    size = BYTES[weights]
    compute = half or weights
    return Precision(compute, size, size, 8.0 * size, size, size, 0, size, autocast=half is not None)


def _zero_precision(compute: Dtype) -> Precision:
    """Return ZeRO's precision: half-precision parameters and gradients, float32 masters and state (arXiv:1910.02054,
    section 3.1).

    Adapters are cast to the dtype of the base too (https://github.com/huggingface/trl/issues/6089).
    """
    size = BYTES[compute]
    masters = 4 if size < 4 else 0
    return Precision(compute, size, size, 8.0 * size, size, size, masters, 4, autocast=False)


def _fsdp_precision(recipe: Recipe, half: Dtype | None, loaded: Dtype) -> Precision:
    """Return FSDP2's precision: trained weights stay in float32 and are their own masters; gathered weights are cast
    (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html, `MixedPrecisionPolicy`).
    """
    weights = BYTES["float32" if half and not recipe.is_lora else loaded]
    trained = 4 if recipe.is_lora else weights
    compute = half or loaded
    return Precision(
        compute=compute,
        stream=BYTES[compute],
        weights=weights,
        projection_bits=8.0 * weights,
        trained=trained,
        gradients=trained,
        masters=0,
        state=trained,
        autocast=False,
        gathers_cast=half is not None,
    )


def _lora_precision(recipe: Recipe, half: Dtype | None, loaded: Dtype) -> Precision:
    """Return the precision of LoRA in one process or under DDP.

    Adapters are float32 on a half-precision base (PEFT's `autocast_adapter_dtype`). On a quantised base TRL makes
    them bf16, as QLoRA does (arXiv:2305.14314, section 3).
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

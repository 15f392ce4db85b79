"""A checkpoint's training state, parameter by parameter, whatever wrote it; files are mapped, and read where asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

WEIGHTS = "weights"
"""What the optimizer steps: float32 masters, or the weights themselves where they are their own masters."""
HIDDEN = "__bnb_optimizer_quant_state__"
MODEL_PARTS, OPTIMIZER_PARTS = "model_states.pt", "optim_states.pt"


class CheckpointState(Protocol):
    """The state of one checkpoint. Tensors are seen flat: element `n` of a parameter's weight and of its moments."""

    keys: tuple[str, ...]
    """Of the optimizer's numbers that every element of a parameter has its own of: `exp_avg`, `exp_avg_sq`."""
    rates: tuple[float, ...]
    """The learning rate of each group of the optimizer that has parameters."""
    loss_scale: float | None
    """Of float16; None where losses are not scaled."""

    def count(self, name: str) -> int | None:
        """Elements of a parameter; None if the checkpoint has no such."""

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        """Fill the 1-D tensor `into` with the elements from `start` on; `key` is `WEIGHTS` or one of `keys`."""

    def shared(self, name: str) -> dict[str, Any]:
        """The optimizer's numbers that a parameter has one of: `step`, as a tensor without dimensions or an int."""


class Class:
    """Stands in for a class of DeepSpeed's that a checkpoint holds: its fields, and none of its code."""

    def __init__(self, *_values: Any) -> None:
        """An enumeration's value is given; nothing is done with it."""


STAND_INS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def mapped(path: Path) -> dict[str, Any]:
    """A file of `torch.save`, its tensors mapped and not read; no code of it is run, and DeepSpeed not imported."""
    import torch

    known: list[Any] = [(Class, name) for name in STAND_INS]
    with torch.serialization.safe_globals(known):
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one parameter; bitsandbytes hides its numbers a level deeper when it writes them
    (https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py, `state_dict`).
    """
    shown = {key: value for key, value in state.items() if key != HIDDEN}
    return {**shown, **state.get(HIDDEN, {})}


def own_keys(states: Sequence[tuple[dict[str, Any], int]]) -> tuple[tuple[str, ...], str | None]:
    """Of optimizer states with the number of elements that each is of: keys with a number for each element, sorted,
    and the first key that is neither that nor one number for all, which no other cut can be made of.
    """
    own: set[str] = set()
    for state, count in states:
        for key, value in state.items():
            if getattr(value, "ndim", 0) == 0:
                continue
            if value.numel() != count or not value.is_floating_point():
                return (), key
            own.add(key)
    return tuple(sorted(own)), None


def local(tensor: Any) -> Any:
    """What this rank has of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def single(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if getattr(value, "ndim", 0) == 0}

"""The interface to a checkpoint's training state, parameter by parameter, for every engine.

Files are memory-mapped, so only the requested elements are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import UserError

WEIGHTS = "weights"
"""The key of the values that the optimizer steps: float32 masters, or the weights themselves without masters."""
HIDDEN = "__bnb_optimizer_quant_state__"
"""The key under which bitsandbytes nests its state."""
MODEL_PARTS, OPTIMIZER_PARTS = "model_states.pt", "optim_states.pt"
"""Ends of the names of DeepSpeed's files."""
STAND_INS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of DeepSpeed in its files that `StandIn` replaces."""


class CheckpointState(Protocol):
    """The state of one checkpoint. Weights and moments are addressed as flat arrays of elements."""

    keys: tuple[str, ...]
    """The keys of optimizer state with one value per element of a parameter, such as `exp_avg` and `exp_avg_sq`."""
    rates: tuple[float, ...]
    """The learning rate of each optimizer group that has parameters."""
    loss_scale: float | None
    """The loss scale of float16 training; None if losses are not scaled."""

    def count(self, name: str) -> int | None:
        """Return the number of elements of a parameter; None if the checkpoint does not have it."""

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        """Fill the 1-D tensor `into` with elements from `start` on. `key` is `WEIGHTS` or one of `keys`."""

    def shared(self, name: str) -> dict[str, Any]:
        """Return the optimizer state with one value per parameter, such as `step`: a 0-d tensor or an int."""


class StandIn:
    """Replaces a DeepSpeed class in a checkpoint: it holds the fields, and runs none of the code."""

    def __init__(self, *_values: Any) -> None:
        """Ignore the arguments. An enumeration passes its value."""


def load_mapped(path: Path) -> dict[str, Any]:
    """Load a file of `torch.save` with its tensors memory-mapped. It runs no code of the file and does not import DeepSpeed."""
    import torch

    known: list[Any] = [(StandIn, name) for name in STAND_INS]
    with torch.serialization.safe_globals(known):
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content


def unwrap_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer state of one parameter, without the level of nesting that bitsandbytes adds in files
    (https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py, `state_dict`).
    """
    plain = {key: value for key, value in state.items() if key != HIDDEN}
    return {**plain, **state.get(HIDDEN, {})}


def find_element_keys(states: Sequence[tuple[dict[str, Any], int]]) -> tuple[tuple[str, ...], str | None]:
    """Return the sorted keys with one value per element, and None.

    A key whose value is neither per element nor a single number cannot be resharded. If there is one, return no keys
    and that key.

    Args:
        states: optimizer states, each with the number of elements of its parameter.
    """
    per_element: set[str] = set()
    for state, count in states:
        for key, value in state.items():
            if getattr(value, "ndim", 0) == 0:
                continue
            if value.numel() != count or not value.is_floating_point():
                return (), key
            per_element.add(key)
    return tuple(sorted(per_element)), None


def local_shard(tensor: Any) -> Any:
    """Return this rank's shard of a tensor; the tensor itself if it is not a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def select_shared(state: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an optimizer state that have one value per parameter."""
    return {key: value for key, value in state.items() if getattr(value, "ndim", 0) == 0}


def cannot_reshard(key: str) -> UserError:
    """Return the error that an optimizer's state cannot be converted."""
    return UserError(
        f"the optimizer's state `{key}` is not one value per weight, so it cannot be converted for another engine or "
        "number of processes",
        hint="resume with the same number of GPUs and the same engine, or start a new run with `optim: adamw_torch`",
    )

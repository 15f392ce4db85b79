"""The interface to a checkpoint's training state, parameter by parameter, for every format.

Files are memory-mapped, so only the requested elements are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError

WEIGHTS = "weights"
"""The key of the values that the optimizer steps: float32 masters, or the weights themselves without masters."""


class Piece(NamedTuple):
    """Consecutive elements of a parameter, from `start` on. `read(a, b)` returns those from `start + a` to `start + b`."""

    start: int
    size: int
    read: Callable[[int, int], Any]


@dataclass(frozen=True)
class SavedParameter:
    """What a checkpoint has of one parameter."""

    shape: tuple[int, ...]
    pieces: Mapping[str, list[Piece]]
    """By `WEIGHTS` and by the keys of the optimizer's state with one value per element, such as `exp_avg`."""
    scalars: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's state with one value per parameter, such as `step`."""
    dtype: str | None = None
    """The dtype in which an export writes the weights; None: as they are stored."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def copy(self, key: str, start: int, into: Any) -> None:
        """Fill the 1-D tensor `into` with elements from `start` on."""
        end = start + into.numel()
        for piece in self.pieces[key]:
            first, last = max(start, piece.start), min(end, piece.start + piece.size)
            if first < last:
                into[first - start : last - start].copy_(piece.read(first - piece.start, last - piece.start))

    def stored_dtype(self, key: str) -> Any:
        """Return torch's dtype of the stored values."""
        return self.pieces[key][0].read(0, 0).dtype

    @property
    def export_dtype(self) -> Any:
        """Torch's dtype of an export."""
        import torch

        return getattr(torch, self.dtype) if self.dtype else self.stored_dtype(WEIGHTS)

    def weights(self) -> Any:
        """Return the whole parameter, in the dtype of an export."""
        import torch

        whole = torch.empty(self.count, dtype=self.export_dtype)
        self.copy(WEIGHTS, 0, whole)
        return whole.view(self.shape)


@dataclass(frozen=True)
class SavedState:
    """The state of one checkpoint."""

    parameters: Mapping[str, SavedParameter]
    """Every trained parameter by name, and the buffers that a model saves with its weights."""
    groups: tuple[dict[str, Any], ...]
    """The settings of each optimizer group that has parameters, such as `lr`."""
    schedule: dict[str, Any]
    """The state of the learning rate's scheduler."""
    scaler: dict[str, Any] | None
    """The state of float16's loss scaler; None if losses are not scaled."""
    own: Callable[[int, str], dict[str, Any]]
    """Return the state of an optimizer's tensor that has another layout than its weights, such as 8-bit moments with
    their scales. The arguments are the rank, and the first parameter of the tensor. Only the same engine on the same
    number of processes can use it."""
    own_keys: tuple[str, ...]
    """The keys of such states."""
    random: Callable[[int], dict[str, Any]]
    """Return the random numbers of a rank, as in `random_state`."""

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate of each optimizer group that has parameters."""
        return tuple(float(group["lr"]) for group in self.groups)

    def shared(self, name: str) -> Mapping[str, Any]:
        """Return the scalars of a parameter; those of another one if the optimizer has never stepped it."""
        own = self.parameters[name].scalars
        return own or next((each.scalars for each in self.parameters.values() if each.scalars), {})


def is_per_element(value: Any, count: int) -> bool:
    """Return whether a value of an optimizer's state has one value per element of its tensor, so that it can be split."""
    return value.ndim > 0 and value.numel() == count and bool(value.is_floating_point())


def local_shard(tensor: Any) -> Any:
    """Return this rank's shard of a tensor; the tensor itself if it is not a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def deepspeed_scaler(scaler: Any) -> dict[str, Any]:
    """Return the state of DeepSpeed's dynamic loss scaler: its fields that change during a training."""
    return {
        "library": "deepspeed",
        "cur_scale": scaler.cur_scale,
        "cur_iter": scaler.cur_iter,
        "last_overflow_iter": scaler.last_overflow_iter,
        "cur_hysteresis": scaler.cur_hysteresis,
    }


def unreadable(path: Path, reason: str) -> UserError:
    """Return the error that a file of a checkpoint is missing or damaged."""
    return UserError(
        f"the checkpoint's file {path.parent.name}/{path.name} cannot be read: {reason}",
        hint="remove its commit from the bucket: the run then resumes from the previous checkpoint",
    )


def cannot_reshard(key: str) -> UserError:
    """Return the error that an optimizer's state cannot be converted."""
    return UserError(
        f"the optimizer's state `{key}` is not one value per weight, so it cannot be converted for another engine or "
        "number of processes",
        hint="resume with the same number of GPUs and the same engine, or start a new run with `optim: adamw_torch`",
    )

"""The files of a checkpoint in format 2, and how to read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import UserError
from trainer.worker.checkpoint.state import Piece, SavedParameter, SavedState

INDEX_FILE, SCALARS_FILE, RANK_FILES = "index.json", "scalars.json", "rank-*.safetensors"
OWN, RANDOM = "own", "random"
"""Groups of tensors in a rank's file, besides those of parameters."""


def rank_file(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def tensor_name(group: str, name: str) -> str:
    """Return a tensor's name in a rank's file. The group is a parameter's key such as `exp_avg`, `OWN` or `RANDOM`."""
    return f"{group}/{name}"


Content = TypeVar("Content", bound=BaseModel)


class Slice(BaseModel):
    """Elements `start` to `start + size` of a parameter, in row-major order, are in this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    start: int
    size: int


class IndexedParameter(BaseModel):
    """Where a parameter is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...]
    dtype: str | None
    """The dtype in which an export writes it; None: as it is stored."""
    keys: tuple[str, ...]
    """`weights`, and the keys of the optimizer's state with one value per element."""
    slices: tuple[Slice, ...]


class Index(BaseModel):
    """The content of `index.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    replicated: bool
    """Whether every rank had all parameters, so that each wrote only a share of them."""
    parameters: dict[str, IndexedParameter]


class TensorScalar(BaseModel):
    """A number that the optimizer keeps as a tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    value: float


class Scalars(BaseModel):
    """The content of `scalars.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    groups: tuple[dict[str, Any], ...]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None
    states: dict[str, dict[str, int | float | TensorScalar]]
    """By parameter: the optimizer's state with one value per parameter."""
    own_keys: tuple[str, ...]


class _Files:
    """The open rank files of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Any] = {}

    def open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open  # type: ignore[import-not-found,unused-ignore]

        if name not in self._opened:
            try:
                self._opened[name] = safe_open(self._folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _broken(self._folder, f"{name}: {error}") from error
        return self._opened[name]

    def reader(self, file: str, tensor: str) -> Callable[[int, int], Any]:
        def read(first: int, last: int) -> Any:
            return self.open(file).get_slice(tensor)[first:last]

        return read

    def group(self, file: str, group: str) -> dict[str, Any]:
        """Return the tensors of a group, without the group's name."""
        opened, prefix = self.open(file), tensor_name(group, "")
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}


def is_format_2(folder: Path) -> bool:
    """Return whether a checkpoint is in this format. One that lacks its index or its scalars is not of format 1."""
    return any((folder / name).is_file() for name in (INDEX_FILE, SCALARS_FILE))


def open_format_2(folder: Path) -> SavedState:
    """Return the state of a checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    index = _read(folder, INDEX_FILE, Index)
    scalars = _read(folder, SCALARS_FILE, Scalars)
    files = _Files(folder)
    needed = {each.file for parameter in index.parameters.values() for each in parameter.slices}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise _broken(folder, f"{missing[0]} is missing")
    parameters = {}
    for name, parameter in index.parameters.items():
        pieces = {
            key: [
                Piece(each.start, each.size, files.reader(each.file, tensor_name(key, name)))
                for each in parameter.slices
            ]
            for key in parameter.keys
        }
        values = {key: _value(value) for key, value in scalars.states.get(name, {}).items()}
        parameters[name] = SavedParameter(parameter.shape, pieces, values, parameter.dtype)
    return SavedState(
        parameters=parameters,
        groups=scalars.groups,
        schedule=scalars.schedule,
        scaler=scalars.scaler,
        own=partial(_own, files, index),
        own_keys=scalars.own_keys,
        random=lambda rank: files.group(rank_file(rank), RANDOM),
    )


def scalar_of(value: Any) -> int | float | TensorScalar:
    """Return a value of an optimizer's state for `scalars.json`.

    Raises:
        TypeError: the value is not a number.
    """
    if hasattr(value, "item"):
        return TensorScalar(dtype=str(value.dtype).removeprefix("torch."), value=float(value.item()))
    if isinstance(value, bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is not a number")


def _value(value: float | TensorScalar) -> Any:
    import torch

    if isinstance(value, TensorScalar):
        return torch.tensor(value.value, dtype=getattr(torch, value.dtype))
    return value


def _own(files: _Files, index: Index, rank: int, first: str) -> dict[str, Any]:
    """Return the states of the tensor that begins with the parameter `first`: the rank's own, or a replica's."""
    file = index.parameters[first].slices[0].file if index.replicated else rank_file(rank)
    return files.group(file, tensor_name(OWN, first))


def _read(folder: Path, name: str, model: type[Content]) -> Content:
    try:
        return model.model_validate(json.loads((folder / name).read_text()))
    except FileNotFoundError:
        raise _broken(folder, f"{name} is missing") from None
    except (ValidationError, ValueError) as error:
        reason = (
            error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        )
        raise _broken(folder, f"{name}: {reason}") from error


def _broken(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {folder.name} cannot be read: {reason}",
        hint="remove its commit from the bucket: the run then resumes from the previous checkpoint",
    )

"""The files of a checkpoint in format 2, and how to read them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer.worker.checkpoint import random_state
from trainer.worker.checkpoint.buffers import DTYPES, Spec, name_of
from trainer.worker.checkpoint.state import WEIGHTS, Piece, SavedParameter, SavedState, unreadable

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


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} is not a known dtype")
    return dtype


Dtype = Annotated[str, AfterValidator(_known)]
"""torch's name of a dtype."""


class Slice(BaseModel):
    """Elements `start` to `start + size` of a parameter, in row-major order, are in this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^rank-[0-9]{5,}\.safetensors$")
    start: NonNegativeInt
    size: NonNegativeInt


class IndexedParameter(BaseModel):
    """Where a parameter is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[NonNegativeInt, ...]
    dtype: Dtype | None
    """The dtype in which an export writes it; None: as it is stored."""
    keys: dict[str, Dtype]
    """The stored dtype of `weights`, and of each key of the optimizer's state with one value per element."""
    slices: tuple[Slice, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """Reject slices that do not make up the parameter."""
        if WEIGHTS not in self.keys:
            raise ValueError("it has no weights")
        at = 0
        for each in sorted(self.slices, key=lambda each: (each.start, each.size)):
            if each.start != at:
                raise ValueError(f"slices overlap or leave a gap at element {min(at, each.start)}")
            at += each.size
        if at != math.prod(self.shape):
            raise ValueError(f"the slices have {at} elements, and the shape {math.prod(self.shape)}")
        if len({each.file for each in self.slices}) < len(self.slices):
            raise ValueError("two slices are in one file")
        return self


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

    dtype: Dtype
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

    @field_validator("groups")
    @classmethod
    def _have_rates(cls, groups: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        if not all(isinstance(group.get("lr"), int | float) for group in groups):
            raise ValueError("a group has no learning rate")
        return groups


class _Files:
    """The open rank files of a checkpoint."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder = folder
        self._opened: dict[str, Any] = {}
        self._indexed: dict[str, list[tuple[str, IndexedParameter, int]]] = defaultdict(list)
        """By file: name, parameter and size of each slice in it."""
        for name, parameter in index.parameters.items():
            for each in parameter.slices:
                self._indexed[each.file].append((name, parameter, each.size))

    def open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open  # type: ignore[import-not-found,unused-ignore]

        if name not in self._opened:
            path = self._folder / name
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise unreadable(path, str(error)) from error
            self._compare(path, opened)
            self._opened[name] = opened
        return self._opened[name]

    def _compare(self, path: Path, opened: Any) -> None:
        """Raise `UserError` if the tensors of a file are not those of the index."""
        others = (tensor_name(OWN, ""), tensor_name(RANDOM, ""))
        slices = {name: opened.get_slice(name) for name in opened.keys() if not name.startswith(others)}  # noqa: SIM118 (not a dict)
        stored = {(name, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        indexed = {
            (tensor_name(key, name), DTYPES[dtype], (size,))
            for name, parameter, size in self._indexed[path.name]
            for key, dtype in parameter.keys.items()
        }
        if different := min(stored ^ indexed, default=None):
            raise unreadable(path, f"{different[0]} is not as {INDEX_FILE} has it")

    def reader(self, file: str, tensor: str) -> Callable[[int, int], Any]:
        def read(first: int, last: int) -> Any:
            return self.open(file).get_slice(tensor)[first:last]

        return read

    def group(self, file: str, group: str) -> dict[str, Any]:
        """Return the tensors of a group, without the group's name."""
        opened, prefix = self.open(file), tensor_name(group, "")
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}

    def random(self, rank: int) -> dict[str, Any]:
        """Return copies of a rank's random numbers, which are in use until the first step. The file is then unmapped."""
        found = self.group(rank_file(rank), RANDOM)
        for name, value in random_state.capture().items():
            if name != "cuda" and (name not in found or Spec.of(found[name]) != Spec.of(value)):
                raise unreadable(self._folder / rank_file(rank), f"it has no random numbers of {name}")
        return {name: value.clone() for name, value in found.items()}


def is_format_2(folder: Path) -> bool:
    """Return whether a checkpoint is in this format. One that lacks its index or its scalars is not of format 1."""
    return any((folder / name).is_file() for name in (INDEX_FILE, SCALARS_FILE))


def open_format_2(folder: Path) -> SavedState:
    """Return the state of a checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    index = _read(folder / INDEX_FILE, Index)
    scalars = _read(folder / SCALARS_FILE, Scalars)
    files = _Files(folder, index)
    needed = {each.file for parameter in index.parameters.values() for each in parameter.slices}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise unreadable(folder / missing[0], "it is missing")
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
        random=files.random,
    )


def scalar_of(value: Any) -> int | float | TensorScalar:
    """Return a value of an optimizer's state for `scalars.json`.

    Raises:
        TypeError: the value is not a number.
    """
    if hasattr(value, "item"):
        return TensorScalar(dtype=name_of(value.dtype), value=float(value.item()))
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


def _read(path: Path, model: type[Content]) -> Content:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise unreadable(path, "it is missing") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise unreadable(
            path, ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        ) from error

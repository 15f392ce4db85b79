"""Reads the pickles of format 1 so that they can build only tensors and plain values, and run no code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.worker.checkpoint.state import unreadable

STAND_INS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of DeepSpeed in its files that `StandIn` replaces."""
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float64", "float32", "bfloat16", "float16", "uint8", "int8", "int32", "int64", "bool"),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}  # fmt: skip
"""The classes that DCP's index, which is a pickle, may contain. No other class is loaded."""
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)
"""Errors of torch and pickle about a file that is truncated or changed."""


class StandIn:
    """Replaces a DeepSpeed class in a checkpoint: it holds the fields, and runs none of the code."""

    def __init__(self, *_values: Any) -> None:
        """Ignore the arguments. An enumeration passes its value."""


class _IndexUnpickler(pickle.Unpickler):
    """Loads only the classes of `INDEX_CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def load_mapped(path: Path) -> dict[str, Any]:
    """Load a file of `torch.save` with its tensors memory-mapped. This does not import DeepSpeed.

    Raises:
        UserError: the file is damaged, or has something else than tensors and plain values.
    """
    import torch

    known: list[Any] = [(StandIn, name) for name in STAND_INS]
    with _reading(path), torch.serialization.safe_globals(known):
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return content


def load_random(path: Path) -> dict[str, Any]:
    """Load a file with the random numbers of a process, which has arrays of NumPy.

    Raises:
        UserError: as `load_mapped`.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    with _reading(path), safe_globals():
        content: dict[str, Any] = torch.load(path, weights_only=True)
        return content


def load_part(path: Path, offset: int, length: int) -> Any:
    """Load a value that `torch.save` wrote as a part of a file.

    Raises:
        UserError: as `load_mapped`.
    """
    import torch

    with _reading(path), path.open("rb") as file:
        file.seek(offset)
        return torch.load(io.BytesIO(file.read(length)), weights_only=True)


def load_index(path: Path) -> Any:
    """Load the index of a DCP folder.

    Raises:
        UserError: the file is damaged, or contains a class that is not in `INDEX_CLASSES`.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    with _reading(path), path.open("rb") as file:
        index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"{type(index).__name__} is not an index")
        return index


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert the errors of a file that cannot be loaded."""
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's message advises to run the code
        raise unreadable(path, "it is damaged, or has more than tensors and plain values") from error
    except DAMAGE as error:
        raise unreadable(path, f"{type(error).__name__}: {error}".partition("\n")[0]) from error

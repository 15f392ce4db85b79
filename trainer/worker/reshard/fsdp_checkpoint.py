"""The checkpoint that FSDP2's ranks write through torch.distributed.checkpoint (DCP), read as one state.

It has two DCP folders: one of the model, one of the optimizer. A DCP folder has a file per rank, in which tensors follow
one another, each as `torch.save` writes it. An index lists which rows of which tensor are where
(`torch/distributed/checkpoint/filesystem.py`).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.worker.reshard.checkpoint_state import (
    WEIGHTS,
    cannot_reshard,
    find_element_keys,
    select_shared,
)
from trainer.worker.reshard.replica_checkpoint import find_written_name, read_loss_scale

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # Accelerate's names
INDEX = ".metadata"
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
"""The classes that an index, which is a pickle, may contain. No other class is loaded."""


class Chunk(NamedTuple):
    """Rows of a tensor: `size` elements from element `start` on, at byte `at` of a file."""

    path: Path
    at: int
    start: int
    size: int


class _IndexUnpickler(pickle.Unpickler):
    """Loads only the classes of `INDEX_CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"a checkpoint's index must not contain {module}.{name}")
        return super().find_class(module, name)


class DcpFolder:
    """One DCP folder, with its files memory-mapped."""

    def __init__(self, folder: Path) -> None:
        with (folder / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        self.files = {info.relative_path for info in index.storage_data.values()}
        self.tensors = {
            name: entry for name, entry in index.state_dict_metadata.items() if hasattr(entry, "chunks")
        }
        """DCP's metadata of each tensor by name: `size` (a shape), `properties.dtype`."""
        self.paths: dict[str, tuple[Any, ...]] = index.planner_data
        """The keys that lead to each entry in the nested state dict, by name."""
        self._folder = folder
        self._stored = {
            (where.fqn, tuple(where.offset or ())): info for where, info in index.storage_data.items()
        }
        self._mapped: dict[Path, Any] = {}
        self._chunks: dict[str, list[Chunk]] = {}

    def count(self, name: str) -> int:
        """Return the number of elements of a tensor."""
        return math.prod(self.tensors[name].size)

    def copy(self, name: str, start: int, into: Any) -> None:
        """Fill the 1-D tensor `into` with elements from `start` on."""
        dtype, end = self.tensors[name].properties.dtype, start + into.numel()
        if name not in self._chunks:
            self._chunks[name] = list(map(self._chunk_reader(name), self.tensors[name].chunks))
        for chunk in self._chunks[name]:
            first, last = max(start, chunk.start), min(end, chunk.start + chunk.size)
            if first < last:
                at = chunk.at + (first - chunk.start) * dtype.itemsize
                read = self._map_bytes(chunk.path)[at : at + (last - first) * dtype.itemsize]
                # the clone is aligned, which `view` needs; the bytes in the file are not
                into[first - start : last - start].copy_(read.clone().view(dtype))

    def tensor(self, name: str) -> Any:
        """Return a whole tensor."""
        import torch

        metadata = self.tensors[name]
        whole = torch.empty(self.count(name), dtype=metadata.properties.dtype)
        self.copy(name, 0, whole)
        return whole.view(metadata.size)

    def value(self, name: str) -> Any:
        """Return an entry that is not a tensor."""
        import torch

        info = self._stored[name, ()]
        with (self._folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return torch.load(io.BytesIO(file.read(info.length)), weights_only=True)

    def _chunk_reader(self, name: str) -> Any:
        """Return a function from DCP's metadata of a chunk of this tensor to a `Chunk`."""
        shape = self.tensors[name].size
        row = math.prod(shape[1:])

        def chunk(metadata: Any) -> Chunk:
            size = math.prod(metadata.sizes)
            if tuple(metadata.sizes[1:]) != tuple(shape[1:]):
                raise RuntimeError(f"{name} is not sharded by rows: {metadata}")
            start = metadata.offsets[0] * row if len(shape) else 0
            if not size:  # a rank without rows of this tensor
                return Chunk(self._folder, 0, start, 0)
            info = self._stored[name, tuple(metadata.offsets)]
            path = self._folder / info.relative_path
            return Chunk(path, info.offset + _find_first_byte(path, info), start, size)

        return chunk

    def _map_bytes(self, path: Path) -> Any:
        import torch

        if path not in self._mapped:
            size = path.stat().st_size
            self._mapped[path] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self._mapped[path]


class FsdpState:
    """The `CheckpointState` of an FSDP2 checkpoint."""

    def __init__(self, folder: Path, order: Sequence[Sequence[str]]) -> None:
        """Open the files.

        Args:
            folder: the checkpoint.
            order: the names of each parameter (tied weights have several), in the optimizer's order.

        Raises:
            UserError: the optimizer's state cannot be resharded.
        """
        self._model, self._optimizer = DcpFolder(folder / MODEL), DcpFolder(folder / OPTIMIZER)
        weights = {self._model.paths[name][-1]: name for name in self._model.tensors}
        self._weights = {each[0]: weights.get(find_written_name(each, weights) or "") for each in order}
        states = self._group_by_parameter()
        self._states = {each[0]: next((states[n] for n in each if n in states), {}) for each in order}
        self.keys, odd = find_element_keys(
            [(self._make_empty(state), self.count(name) or 0) for name, state in self._states.items()]
        )
        if odd:
            raise cannot_reshard(odd)
        self.rates = self._read_rates()
        self.loss_scale = read_loss_scale(folder / "scaler.pt")

    def count(self, name: str) -> int | None:
        written = self._weights.get(name)
        return None if written is None else self._model.count(written)

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        if key == WEIGHTS:
            self._model.copy(str(self._weights[name]), start, into)
        elif key in self._states[name]:
            self._optimizer.copy(self._states[name][key], start, into)
        else:  # torch has no state for a weight that never got a gradient
            into.zero_()

    def shared(self, name: str) -> dict[str, Any]:
        state = self._states[name] or next(filter(None, self._states.values()), {})
        keys = select_shared(self._make_empty(state))
        return {key: self._optimizer.tensor(state[key]) for key in keys}

    def _group_by_parameter(self) -> dict[str, dict[str, str]]:
        """Return the names of the optimizer's tensors, by the parameter's name and the key of the state."""
        found: dict[str, dict[str, str]] = {}
        for name in self._optimizer.tensors:
            _, kind, parameter, key = self._optimizer.paths[name]
            if kind == "state":
                found.setdefault(parameter, {})[key] = name
        return found

    def _make_empty(self, state: dict[str, str]) -> dict[str, Any]:
        """Return tensors with the stored shapes and dtypes, and without data."""
        import torch

        metadata = {key: self._optimizer.tensors[name] for key, name in state.items()}
        return {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in metadata.items()
        }

    def _read_rates(self) -> tuple[float, ...]:
        groups: dict[int, dict[str, str]] = {}
        for name, path in self._optimizer.paths.items():
            if path[1] == "param_groups":
                groups.setdefault(path[2], {})[path[3]] = name
        filled = [group for _, group in sorted(groups.items()) if self._optimizer.value(group["params"])]
        return tuple(float(self._optimizer.value(group["lr"])) for group in filled)


def _find_first_byte(path: Path, info: Any) -> int:
    """Return the byte at which a tensor's elements begin within what `torch.save` wrote of it."""
    import torch
    from torch.distributed.checkpoint.utils import _create_file_view

    with path.open("rb") as file:
        archive = torch._C.PyTorchFileReader(_create_file_view(file, info.offset, info.length))  # noqa: SLF001
        return int(archive.get_record_offset("data/0"))

"""A folder of torch.distributed.checkpoint, as FSDP 2 leaves two: of the model, and of the optimizer.

It has a file for each rank, in which tensors lie one after the other, each as `torch.save` writes it, and an index of
which rows of which tensor lie where (`torch/distributed/checkpoint/filesystem.py`).
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

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
"""What the index, a pickle, consists of; nothing else of it is made."""


class Chunk(NamedTuple):
    """Rows of a tensor: `size` elements from `start` on, which lie at byte `at` of a file."""

    path: Path
    at: int
    start: int
    size: int


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"a checkpoint's index has no {module}.{name}")
        return super().find_class(module, name)


class Folder:
    """One folder, its files mapped."""

    def __init__(self, folder: Path) -> None:
        with (folder / INDEX).open("rb") as file:
            index = _Index(file).load()
        self.files = {info.relative_path for info in index.storage_data.values()}
        self.tensors = {
            name: each for name, each in index.state_dict_metadata.items() if hasattr(each, "chunks")
        }
        """By name: `size` (a shape), `properties.dtype`."""
        self.paths: dict[str, tuple[Any, ...]] = index.planner_data
        """Of every name: the keys that lead to it."""
        self._folder = folder
        self._stored = {
            (where.fqn, tuple(where.offset or ())): info for where, info in index.storage_data.items()
        }
        self._mapped: dict[Path, Any] = {}
        self._chunks: dict[str, list[Chunk]] = {}

    def count(self, name: str) -> int:
        """Elements."""
        return math.prod(self.tensors[name].size)

    def copy(self, name: str, start: int, into: Any) -> None:
        """Fill the 1-D tensor `into` with the elements from `start` on."""
        dtype, end = self.tensors[name].properties.dtype, start + into.numel()
        if name not in self._chunks:
            self._chunks[name] = list(map(self._chunk_of(name), self.tensors[name].chunks))
        for chunk in self._chunks[name]:
            first, last = max(start, chunk.start), min(end, chunk.start + chunk.size)
            if first < last:
                at = chunk.at + (first - chunk.start) * dtype.itemsize
                read = self._bytes(chunk.path)[at : at + (last - first) * dtype.itemsize]
                into[first - start : last - start].copy_(read.clone().view(dtype))  # it lies unaligned

    def tensor(self, name: str) -> Any:
        """All of one."""
        import torch

        about = self.tensors[name]
        whole = torch.empty(self.count(name), dtype=about.properties.dtype)
        self.copy(name, 0, whole)
        return whole.view(about.size)

    def value(self, name: str) -> Any:
        """What is no tensor."""
        import torch

        info = self._stored[name, ()]
        with (self._folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return torch.load(io.BytesIO(file.read(info.length)), weights_only=True)

    def _chunk_of(self, name: str) -> Any:
        shape = self.tensors[name].size
        row = math.prod(shape[1:])

        def chunk(about: Any) -> Chunk:
            size = math.prod(about.sizes)
            if tuple(about.sizes[1:]) != tuple(shape[1:]):
                raise RuntimeError(f"{name} is not cut by rows: {about}")
            start = about.offsets[0] * row if len(shape) else 0
            if not size:  # a rank without any row of it
                return Chunk(self._folder, 0, start, 0)
            info = self._stored[name, tuple(about.offsets)]
            path = self._folder / info.relative_path
            return Chunk(path, info.offset + _first_byte(path, info), start, size)

        return chunk

    def _bytes(self, path: Path) -> Any:
        import torch

        if path not in self._mapped:
            size = path.stat().st_size
            self._mapped[path] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self._mapped[path]


def _first_byte(path: Path, info: Any) -> int:
    """Where a tensor's elements begin in what `torch.save` wrote of it."""
    import torch
    from torch.distributed.checkpoint.utils import _create_file_view

    with path.open("rb") as file:
        archive = torch._C.PyTorchFileReader(_create_file_view(file, info.offset, info.length))  # noqa: SLF001
        return int(archive.get_record_offset("data/0"))

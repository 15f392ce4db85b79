"""Reads one folder of torch.distributed.checkpoint (DCP), as format 1 has it under FSDP2.

There is a file per rank, in which tensors follow one another as `torch.save` writes them, and an index of which rows of
which tensor are where (`torch/distributed/checkpoint/filesystem.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.worker.checkpoint.pickles import load_index, load_part
from trainer.worker.checkpoint.state import Piece, unreadable

DCP_INDEX = ".metadata"
"""DCP's name of its index."""


class DcpFolder:
    """One DCP folder, with its files memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            UserError: the index is damaged, contains other classes than DCP's, or names a file outside the folder.
        """
        index = load_index(folder / DCP_INDEX)
        self.files = {info.relative_path for info in index.storage_data.values()}
        if outside := [name for name in self.files if Path(name).name != name]:
            raise unreadable(folder / DCP_INDEX, f"{outside[0]} is not in this folder")
        self.paths: dict[str, tuple[Any, ...]] = index.planner_data
        """The keys that lead to each entry in the nested state dict, by name."""
        self.tensors = {
            name: each for name, each in index.state_dict_metadata.items() if hasattr(each, "chunks")
        }
        """DCP's metadata of each tensor by name: `size` (a shape), `properties.dtype`, `chunks`."""
        self._folder = folder
        self._stored = {
            (where.fqn, tuple(where.offset or ())): info for where, info in index.storage_data.items()
        }
        self._mapped: dict[Path, Any] = {}

    def pieces(self, name: str) -> list[Piece]:
        """Return the pieces of a tensor, one for each rank that has rows of it."""
        shape, dtype = self.tensors[name].size, self.tensors[name].properties.dtype
        row = math.prod(shape[1:])
        found = []
        for chunk in self.tensors[name].chunks:
            if tuple(chunk.sizes[1:]) != tuple(shape[1:]):
                raise RuntimeError(f"{name} is not sharded by rows: {chunk}")
            if size := math.prod(chunk.sizes):
                start = chunk.offsets[0] * row if len(shape) else 0
                found.append(
                    Piece(start, size, self._reader(self._stored[name, tuple(chunk.offsets)], dtype))
                )
        return found

    def value(self, name: str) -> Any:
        """Return an entry that is not a tensor."""
        info = self._stored[name, ()]
        return load_part(self._folder / info.relative_path, info.offset, info.length)

    def _reader(self, info: Any, dtype: Any) -> Callable[[int, int], Any]:
        import torch

        path = self._folder / info.relative_path

        def read(first: int, last: int) -> Any:
            if path not in self._mapped:
                size = path.stat().st_size
                self._mapped[path] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            at = info.offset + _first_byte(path, info)
            found = self._mapped[path][at + first * dtype.itemsize : at + last * dtype.itemsize]
            return found.clone().view(dtype)  # the clone is aligned, which `view` needs; the file is not

        return read


def _first_byte(path: Path, info: Any) -> int:
    """Return the byte at which a tensor's elements begin within what `torch.save` wrote of it."""
    import torch
    from torch.distributed.checkpoint.utils import _create_file_view

    with path.open("rb") as file:
        archive = torch._C.PyTorchFileReader(_create_file_view(file, info.offset, info.length))  # noqa: SLF001
        return int(archive.get_record_offset("data/0"))

"""Files for staged checkpoints whose memory is reused, so that a save costs no more than a copy.

A file is in the safetensors format (https://github.com/huggingface/safetensors#format). A training saves the same tensors
again and again, so the header is written once, and a save overwrites the bytes behind it through a memory map. The
package safetensors can only write a new file, whose memory the kernel must allocate and clear each time.

A checkpoint's folder gets a hard link to the file. As long as the folder exists, the file is in use. The supervisor
uploads the folder and removes it; then the link is gone, and the file is free for a later save. A crash of the training
therefore loses nothing that was staged.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of dtypes in safetensors, by torch's names."""
ALIGNMENT = 64
"""Bytes: tensors begin at a multiple of their elements' size, and copies are faster at cache lines."""


def name_of(dtype: Any) -> str:
    """Return torch's name of a dtype: `float32`."""
    return str(dtype).removeprefix("torch.")


class Spec(NamedTuple):
    """A tensor's dtype and shape."""

    dtype: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Spec:
        """Return the spec of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


class Buffer:
    """A memory-mapped safetensors file of fixed tensors."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], *, pinned: bool) -> None:
        """Create the file and allocate its memory.

        Args:
            path: the file.
            specs: the tensors by name.
            pinned: whether to register the memory with CUDA, so that a GPU copies into it at full speed.

        Raises:
            OSError: there is no room for the file.
        """
        import torch

        self.path = path
        self.specs = dict(specs)
        header, offsets, size = _lay_out(specs)
        try:
            with path.open("wb") as file:
                # Without this, a full file system would kill the process by SIGBUS during a copy.
                os.posix_fallocate(file.fileno(), 0, size)
                file.write(header)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._bytes = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        self._pinned = pinned and _pin(self._bytes)
        self._views = {
            name: self._bytes[offsets[name] : offsets[name] + _size(spec)].view(spec.dtype).view(spec.shape)
            for name, spec in specs.items()
        }

    def is_free(self) -> bool:
        """Return whether no checkpoint's folder contains the file."""
        return self.path.stat().st_nlink == 1

    def remove(self) -> None:
        """Delete the file and give its memory back."""
        import torch

        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self.path.unlink()

    def copy(self, tensors: Mapping[str, Any]) -> None:
        """Overwrite the file with these tensors, and wait for copies from a GPU."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the host reads paged optimizer states, which kernels may still be writing
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._views[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class Buffers:
    """The buffers of one process: two in turn, and a third one if a run is stopped while both wait for upload."""

    def __init__(self, folder: Path, name: str) -> None:
        """Keep the files in `folder`. In a checkpoint the file is called `name`."""
        self._folder = folder
        self._name = name
        self._buffers: list[Buffer] = []

    def save(self, tensors: Mapping[str, Any], into: Path) -> None:
        """Copy the tensors, and put the file into the checkpoint's folder `into`.

        Raises:
            OSError: there is no room for another buffer.
        """
        specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
        buffer = self._take_free(specs)
        buffer.copy(tensors)
        target = into / self._name
        target.unlink(missing_ok=True)  # this step was saved before, and not staged
        os.link(buffer.path, target)

    def _take_free(self, specs: dict[str, Spec]) -> Buffer:
        """Return a free buffer for these tensors. An optimizer may get more states after its first steps."""
        import torch

        free = [buffer for buffer in self._buffers if buffer.is_free()]
        for buffer in free:
            if buffer.specs == specs:
                return buffer
        for buffer in free:
            self._buffers.remove(buffer)
            buffer.remove()
        self._folder.mkdir(parents=True, exist_ok=True)
        number = next(n for n in count() if not self._path(n).exists())
        made = Buffer(self._path(number), specs, pinned=torch.cuda.is_available())
        self._buffers.append(made)
        return made

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}-{self._name}"


def _lay_out(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    """Return the header, the offset of each tensor in the file, and the size of the file.

    safetensors allows no gaps between tensors. Those with the largest elements come first, so all are aligned.
    """
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    entries: dict[str, Any] = {}
    at = 0
    for name in order:
        spec = specs[name]
        end = at + _size(spec)
        dtype = DTYPES[name_of(spec.dtype)]
        entries[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + entries[name]["data_offsets"][0] for name in order}
    return header, offsets, len(header) + at


def _size(spec: Spec) -> int:
    """Return the bytes of a tensor."""
    return math.prod(spec.shape) * int(spec.dtype.itemsize)


def _pin(memory: Any) -> bool:
    """Pin memory for CUDA: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html

    Without it, a copy from a GPU passes through a small pinned buffer and is several times slower.
    """
    import torch

    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if error:
        log.warning("CUDA cannot pin the memory of a save (error %d), so saves take longer", error)
    return not error

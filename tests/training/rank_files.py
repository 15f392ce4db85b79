"""Reads and damages the tensors in the files of a checkpoint's ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainer.worker.checkpoint.format import RANDOM, RANK_FILES, SCALARS_FILE


def read(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors by file and name."""
    return {path.name: load_file(path) for path in sorted(folder.glob(RANK_FILES))}


def trained_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file's tensors, without the random numbers."""
    return {
        file: sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith(f"{RANDOM}/"))
        for file, tensors in read(folder).items()
    }


def copy_with(
    checkpoint: Path, into: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Path:
    """Copy a checkpoint into the folder `into`. `change` gets each tensor with its name, and returns another one or None.

    It must change at least one tensor.
    """
    copy = shutil.copytree(checkpoint, into / checkpoint.name)
    changed = 0
    for file, tensors in read(copy).items():
        others = {name: change(name, tensor) for name, tensor in tensors.items()}
        found = {name: other for name, other in others.items() if other is not None}
        save_file({**tensors, **found}, copy / file)
        changed += len(found)
    assert changed
    return copy


def copy_with_zeros(checkpoint: Path, into: Path, *groups: str) -> Path:
    """Copy a checkpoint, and set all tensors of these groups, such as `exp_avg`, to zero."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(tensor) if name.partition("/")[0] in groups else None

    return copy_with(checkpoint, into, change)


def copy_with_scalars(checkpoint: Path, into: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint, and change its numbers in place."""
    copy = shutil.copytree(checkpoint, into / checkpoint.name)
    before = (copy / SCALARS_FILE).read_text()
    scalars = json.loads(before)
    change(scalars)
    (copy / SCALARS_FILE).write_text(json.dumps(scalars))
    assert scalars != json.loads(before)
    return copy

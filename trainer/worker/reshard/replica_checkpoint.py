"""The checkpoint that Transformers writes of one process or DDP, read as one state.

Weights are in safetensors. `optimizer.pt` has the states by the number of the parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.worker.reshard.checkpoint_state import (
    WEIGHTS,
    cannot_reshard,
    find_element_keys,
    load_mapped,
    select_shared,
    unwrap_state,
)

INDEX = "*model.safetensors.index.json"
ADAPTER = "default"
"""PEFT's name of the trained adapter. Its files leave this name out of the weights' names."""


class ReplicaState:
    """The `CheckpointState` of a checkpoint without shards."""

    def __init__(self, folder: Path, order: Sequence[Sequence[str]]) -> None:
        """Open the files.

        Args:
            folder: the checkpoint.
            order: the names of each parameter (tied weights have several), in the optimizer's order.

        Raises:
            UserError: the optimizer's state cannot be resharded.
        """
        written = load_mapped(folder / "optimizer.pt")
        written["state"] = {number: unwrap_state(state) for number, state in written["state"].items()}
        groups = [group for group in written["param_groups"] if group["params"]]
        numbers = [number for group in groups for number in group["params"]]
        self._files = _open_files(folder)
        self._names = {each[0]: find_written_name(each, self._files) for each in order}
        self._states = {
            each[0]: written["state"].get(number, {}) for each, number in zip(order, numbers, strict=True)
        }
        self.keys, odd = find_element_keys(
            [(state, self.count(name) or 0) for name, state in self._states.items()]
        )
        if odd:
            raise cannot_reshard(odd)
        self.rates = tuple(float(group["lr"]) for group in groups)
        self.loss_scale = read_loss_scale(folder / "scaler.pt")

    def count(self, name: str) -> int | None:
        written = self._names.get(name)
        if written is None:
            return None
        count = 1
        for size in self._files[written].get_slice(written).get_shape():
            count *= size
        return count

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        if key == WEIGHTS:
            written = str(self._names[name])
            source = self._files[written].get_tensor(written)
        elif key in self._states[name]:
            source = self._states[name][key]
        else:  # torch has no state for a weight that never got a gradient
            into.zero_()
            return
        into.copy_(source.reshape(-1)[start : start + into.numel()])

    def shared(self, name: str) -> dict[str, Any]:
        return select_shared(self._states[name] or next(filter(None, self._states.values()), {}))


def _open_files(folder: Path) -> dict[str, Any]:
    """Return the open file of each weight."""
    from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

    names: Iterable[str] = [path.name for path in folder.glob("*model.safetensors")]
    for index in folder.glob(INDEX):
        names = set(json.loads(index.read_text())["weight_map"].values())
    opened = [safe_open(folder / name, framework="pt") for name in names]
    return {weight: file for file in opened for weight in file.keys()}  # noqa: SIM118 (not a dict)


def find_written_name(names: Iterable[str], files: Mapping[str, Any]) -> str | None:
    """Return the name of a parameter in the files: one of `names`, or PEFT's form of it; None if it is in no file."""
    for name in names:
        without = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}", "")
        for written in (name, without, without.removesuffix(".weight")):
            if written in files:
                return written
    return None


def read_loss_scale(path: Path) -> float | None:
    """Return float16's loss scale from Accelerate's file; None if there is no file."""
    return float(load_mapped(path)["scale"]) if path.is_file() else None

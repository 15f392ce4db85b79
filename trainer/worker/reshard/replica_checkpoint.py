"""What Transformers writes of one process or DDP, as one state: weights in safetensors, `optimizer.pt` by number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.worker.reshard.checkpoint_state import WEIGHTS, mapped, own_keys, single, unwrapped
from trainer.worker.reshard.deepspeed_checkpoint import cannot_cut

INDEX = "*model.safetensors.index.json"
ADAPTER = "default"
"""PEFT's name of the adapter that is trained, which its files leave out of the weights' names."""


class ReplicaState:
    """A checkpoint of whole replicas, as `Saved`."""

    def __init__(self, folder: Path, order: Sequence[Sequence[str]]) -> None:
        """`order` holds sets of names that are one parameter (tied weights have several), in the optimizer's order.

        Raises:
            UserError: the optimizer's numbers cannot be cut in another way.
        """
        written = mapped(folder / "optimizer.pt")
        written["state"] = {number: unwrapped(state) for number, state in written["state"].items()}
        groups = [group for group in written["param_groups"] if group["params"]]
        numbers = [number for group in groups for number in group["params"]]
        self._files = _files(folder)
        self._names = {each[0]: written_as(each, self._files) for each in order}
        self._states = {
            each[0]: written["state"].get(number, {}) for each, number in zip(order, numbers, strict=True)
        }
        self.keys, odd = own_keys([(state, self.count(name) or 0) for name, state in self._states.items()])
        if odd:
            raise cannot_cut(odd)
        self.rates = tuple(float(group["lr"]) for group in groups)
        self.loss_scale = scale_of(folder / "scaler.pt")

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
        else:  # never stepped: torch keeps nothing of a weight that got no gradient
            into.zero_()
            return
        into.copy_(source.reshape(-1)[start : start + into.numel()])

    def shared(self, name: str) -> dict[str, Any]:
        return single(self._states[name] or next(filter(None, self._states.values()), {}))


def _files(folder: Path) -> dict[str, Any]:
    """The open file that has each weight."""
    from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

    names: Iterable[str] = [path.name for path in folder.glob("*model.safetensors")]
    for index in folder.glob(INDEX):
        names = set(json.loads(index.read_text())["weight_map"].values())
    opened = [safe_open(folder / name, framework="pt") for name in names]
    return {weight: file for file in opened for weight in file.keys()}  # noqa: SIM118 (it is no dict)


def written_as(names: Iterable[str], files: Mapping[str, Any]) -> str | None:
    """Under which name a parameter is in the files: one of its own, or as PEFT writes an adapter's."""
    for name in names:
        without = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}", "")
        for written in (name, without, without.removesuffix(".weight")):
            if written in files:
                return written
    return None


def scale_of(path: Path) -> float | None:
    """Of float16's losses, as Accelerate keeps it."""
    return float(mapped(path)["scale"]) if path.is_file() else None

"""What the ranks of FSDP 2 wrote through torch.distributed.checkpoint, by the parameters' names, as one state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.worker.reshard.checkpoint_state import WEIGHTS, own_keys, single
from trainer.worker.reshard.dcp_folder import MODEL, OPTIMIZER, Folder
from trainer.worker.reshard.deepspeed_checkpoint import cannot_cut
from trainer.worker.reshard.replica_checkpoint import scale_of, written_as


class FsdpState:
    """A checkpoint of FSDP 2, as `Saved`."""

    def __init__(self, folder: Path, order: Sequence[Sequence[str]]) -> None:
        """`order` holds sets of names that are one parameter (tied weights have several), in the optimizer's order.

        Raises:
            UserError: the optimizer's numbers cannot be cut in another way.
        """
        self._model, self._optimizer = Folder(folder / MODEL), Folder(folder / OPTIMIZER)
        weights = {self._model.paths[name][-1]: name for name in self._model.tensors}
        self._weights = {each[0]: weights.get(written_as(each, weights) or "") for each in order}
        states = self._by_parameter()
        self._states = {each[0]: next((states[n] for n in each if n in states), {}) for each in order}
        self.keys, odd = own_keys(
            [(self._like(state), self.count(name) or 0) for name, state in self._states.items()]
        )
        if odd:
            raise cannot_cut(odd)
        self.rates = self._rates()
        self.loss_scale = scale_of(folder / "scaler.pt")

    def count(self, name: str) -> int | None:
        written = self._weights.get(name)
        return None if written is None else self._model.count(written)

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        if key == WEIGHTS:
            self._model.copy(str(self._weights[name]), start, into)
        elif key in self._states[name]:
            self._optimizer.copy(self._states[name][key], start, into)
        else:  # never stepped
            into.zero_()

    def shared(self, name: str) -> dict[str, Any]:
        state = self._states[name] or next(filter(None, self._states.values()), {})
        of_all = single(self._like(state))
        return {key: self._optimizer.tensor(state[key]) for key in of_all}

    def _by_parameter(self) -> dict[str, dict[str, str]]:
        """Names of an optimizer's tensors, by the parameter's name and the key of its state."""
        found: dict[str, dict[str, str]] = {}
        for name in self._optimizer.tensors:
            _, kind, parameter, key = self._optimizer.paths[name]
            if kind == "state":
                found.setdefault(parameter, {})[key] = name
        return found

    def _like(self, state: dict[str, str]) -> dict[str, Any]:
        """Tensors as they are stored, without their numbers."""
        import torch

        about = {key: self._optimizer.tensors[name] for key, name in state.items()}
        return {
            key: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
            for key, each in about.items()
        }

    def _rates(self) -> tuple[float, ...]:
        groups: dict[int, dict[str, str]] = {}
        for name, path in self._optimizer.paths.items():
            if path[1] == "param_groups":
                groups.setdefault(path[2], {})[path[3]] = name
        filled = [group for _, group in sorted(groups.items()) if self._optimizer.value(group["params"])]
        return tuple(float(self._optimizer.value(group["lr"])) for group in filled)

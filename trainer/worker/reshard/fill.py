"""Bring a checkpoint's state into an engine's optimizer, tensor by tensor: no more is held than the engine itself holds."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.worker.reshard.checkpoint_state import WEIGHTS, CheckpointState, local
from trainer.worker.reshard.optimizer_layout import OptimizerTensor, Target

ADAGRAD = {"DeepSpeedCPUAdagrad": {"sum": "exp_avg_sq"}, "Adagrad": {"exp_avg_sq": "sum"}}
"""By class: what torch calls a sum DeepSpeed's code for the host calls otherwise
(https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/ops/adagrad/cpu_adagrad.py)."""


class Kind(NamedTuple):
    """What an optimizer expects of its state."""

    host: bool
    """DeepSpeed's code for the host: its steps are ints."""
    torch: bool
    beside: bool
    """Its steps are where its weights are, as a fused kernel counts them; else on the host."""
    names: dict[str, str]
    """Its own names of keys, where they differ."""

    @classmethod
    def of(cls, optimizer: Any) -> Kind:
        module, name = type(optimizer).__module__, type(optimizer).__name__
        return cls(
            host=module.startswith("deepspeed.ops."),
            torch=module.startswith("torch.optim"),
            beside=any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups),
            names=ADAGRAD.get(name, {}),
        )


def fill(target: Target, saved: CheckpointState) -> int:
    """Set weights, states and learning rates; the bytes that were set.

    Raises:
        UserError: the checkpoint is not of these parameters.
    """
    import torch

    _check(target, saved)
    kind = Kind.of(target.optimizer)
    total = 0
    with torch.no_grad():
        for stepped in target.stepped:
            _copy(WEIGHTS, stepped, saved, stepped.tensor.data)
            state = _state(stepped, saved, kind)
            target.optimizer.state[stepped.tensor] = state
            tensors = [stepped.tensor, *filter(torch.is_tensor, state.values())]
            total += sum(local(each).nbytes for each in tensors)
    _set_rates(target, saved.rates)
    return total


def _copy(key: str, stepped: OptimizerTensor, saved: CheckpointState, into: Any) -> None:
    flat = local(into).view(-1)
    for part in stepped.parts:
        saved.copy(key, part.name, part.start, flat[part.offset : part.offset + part.size])


def _state(stepped: OptimizerTensor, saved: CheckpointState, kind: Kind) -> dict[str, Any]:
    """Of one tensor: zeros where it is padded, as it began."""
    import torch

    state: dict[str, Any] = {}
    dtype = stepped.tensor.dtype if kind.torch else torch.float32
    for key in saved.keys:
        own = torch.zeros_like(stepped.tensor, dtype=dtype, requires_grad=False)
        _copy(key, stepped, saved, own)
        state[kind.names.get(key, key)] = own
    for key, value in saved.shared(stepped.first).items():
        state[key] = _step(value, stepped, kind) if key == "step" else _copied(value)
    return state


def _step(value: Any, stepped: OptimizerTensor, kind: Kind) -> Any:
    """A step as the optimizer counts: each tensor has its own, as they are counted up in place."""
    import torch

    if kind.torch:
        device = stepped.tensor.device if kind.beside else "cpu"
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    return int(value) if kind.host else _copied(value)


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _set_rates(target: Target, rates: tuple[float, ...]) -> None:
    """The scheduler sets the rate after a step only, so the next step's comes with the optimizer. All else that a group
    says is the recipe's, and there already.
    """
    if len(target.groups) != len(rates):  # DeepSpeed makes one group of torch's Adagrad
        if len(set(rates)) != 1:
            raise RuntimeError(f"{len(rates)} learning rates for {len(target.groups)} groups")
        rates = rates[:1] * len(target.groups)
    for group, rate in zip(target.groups, rates, strict=True):
        group.settings["lr"] = rate


def _check(target: Target, saved: CheckpointState) -> None:
    missing = [name for name in target.names if saved.count(name) is None]
    if missing:
        raise UserError(
            f"the checkpoint has no state of {len(missing)} parameters that are trained, {missing[0]} among them",
            hint="remove its commit from the bucket: the run goes on from the one before",
        )

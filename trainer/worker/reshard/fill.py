"""Copy a checkpoint's state into an engine's optimizer, one tensor at a time, so that no extra memory is needed."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.worker.reshard.checkpoint_state import WEIGHTS, CheckpointState, local_shard
from trainer.worker.reshard.optimizer_layout import OptimizerTensor, Target

ADAGRAD = {"DeepSpeedCPUAdagrad": {"sum": "exp_avg_sq"}, "Adagrad": {"exp_avg_sq": "sum"}}
"""By optimizer class: keys that it names differently. torch's `sum` is DeepSpeed's `exp_avg_sq`
(https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/ops/adagrad/cpu_adagrad.py)."""


class StateFormat(NamedTuple):
    """The format in which an optimizer class expects its state."""

    host: bool
    """Whether it is DeepSpeed's code for the host, whose steps are ints."""
    torch: bool
    """Whether it is an optimizer of torch."""
    beside: bool
    """Whether its steps are on the device of its weights, where a fused kernel increments them; else on the host."""
    names: dict[str, str]
    """Its own names for keys that differ."""

    @classmethod
    def of(cls, optimizer: Any) -> StateFormat:
        """Return the format of an optimizer."""
        module, name = type(optimizer).__module__, type(optimizer).__name__
        return cls(
            host=module.startswith("deepspeed.ops."),
            torch=module.startswith("torch.optim"),
            beside=any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups),
            names=ADAGRAD.get(name, {}),
        )


def fill(target: Target, saved: CheckpointState) -> int:
    """Set the weights, states and learning rates, and return the bytes that were set.

    Raises:
        UserError: the checkpoint lacks a trained parameter.
    """
    import torch

    _check(target, saved)
    kind = StateFormat.of(target.optimizer)
    total = 0
    with torch.no_grad():
        for stepped in target.stepped:
            _copy(WEIGHTS, stepped, saved, stepped.tensor.data)
            state = _state(stepped, saved, kind)
            target.optimizer.state[stepped.tensor] = state
            tensors = [stepped.tensor, *filter(torch.is_tensor, state.values())]
            total += sum(local_shard(each).nbytes for each in tensors)
    _set_rates(target, saved.rates)
    return total


def _copy(key: str, stepped: OptimizerTensor, saved: CheckpointState, into: Any) -> None:
    flat = local_shard(into).view(-1)
    for part in stepped.parts:
        saved.copy(key, part.name, part.start, flat[part.offset : part.offset + part.size])


def _state(stepped: OptimizerTensor, saved: CheckpointState, kind: StateFormat) -> dict[str, Any]:
    """Return the state of one tensor. Padding is zero, as in a new optimizer."""
    import torch

    state: dict[str, Any] = {}
    dtype = stepped.tensor.dtype if kind.torch else torch.float32
    for key in saved.keys:
        values = torch.zeros_like(stepped.tensor, dtype=dtype, requires_grad=False)
        _copy(key, stepped, saved, values)
        state[kind.names.get(key, key)] = values
    for key, value in saved.shared(stepped.first).items():
        state[key] = _step(value, stepped, kind) if key == "step" else _copied(value)
    return state


def _step(value: Any, stepped: OptimizerTensor, kind: StateFormat) -> Any:
    """Return a step in the optimizer's format. Each tensor has its own copy, because steps are incremented in place."""
    import torch

    if kind.torch:
        device = stepped.tensor.device if kind.beside else "cpu"
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    return int(value) if kind.host else _copied(value)


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def _set_rates(target: Target, rates: tuple[float, ...]) -> None:
    """Set the learning rates of the optimizer's groups.

    The scheduler sets a rate only after a step, so the rate of the next step is part of the optimizer's state. All
    other settings of a group come from the recipe and are already set.
    """
    if len(target.groups) != len(rates):  # DeepSpeed merges the groups of torch's Adagrad
        if len(set(rates)) != 1:
            raise RuntimeError(
                f"the checkpoint has {len(rates)} different learning rates, but the optimizer has {len(target.groups)} groups"
            )
        rates = rates[:1] * len(target.groups)
    for group, rate in zip(target.groups, rates, strict=True):
        group.settings["lr"] = rate


def _check(target: Target, saved: CheckpointState) -> None:
    missing = [name for name in target.names if saved.count(name) is None]
    if missing:
        raise UserError(
            f"the checkpoint has no state for {len(missing)} trained parameters, such as {missing[0]}",
            hint="delete its manifest from the bucket; the run then resumes from the checkpoint before it",
        )

"""Copies a checkpoint's state into an engine's optimizer, one tensor at a time, so that no extra memory is needed."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.worker.checkpoint.optimizer_layout import OptimizerTensor, Target
from trainer.worker.checkpoint.state import WEIGHTS, SavedState, cannot_reshard, local_shard

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


class Filler:
    """Fills one optimizer from one checkpoint."""

    def __init__(self, target: Target, saved: SavedState, *, rank: int, same_form: bool) -> None:
        """Create the filler.

        Args:
            target: the optimizer, prepared but without state.
            saved: the checkpoint.
            rank: this process.
            same_form: whether the same engine on the same number of processes wrote the checkpoint. Only then can an
                optimizer continue with a state that is not one value per weight.

        Raises:
            UserError: the state cannot be converted, or a trained parameter is missing.
        """
        if saved.own_keys and not same_form:
            raise cannot_reshard(saved.own_keys[0])
        if missing := [name for name in target.names if name not in saved.parameters]:
            raise UserError(
                f"the checkpoint has no state for {len(missing)} trained parameters, such as {missing[0]}",
                hint="delete its manifest from the bucket; the run then resumes from the checkpoint before it",
            )
        self._target = target
        self._saved = saved
        self._rank = rank
        self._same_form = same_form
        self._format = StateFormat.of(target.optimizer)

    def fill(self) -> int:
        """Set the weights, states and settings, and return the bytes that were set."""
        import torch

        total = 0
        with torch.no_grad():
            for stepped in self._target.stepped:
                self._copy(WEIGHTS, stepped, stepped.tensor.data)
                state = self._state(stepped)
                if state:
                    self._target.optimizer.state[stepped.tensor] = state
                tensors = [stepped.tensor, *filter(torch.is_tensor, state.values())]
                total += sum(local_shard(each).nbytes for each in tensors)
        self._set_groups()
        return total

    def _copy(self, key: str, stepped: OptimizerTensor, into: Any) -> None:
        flat = local_shard(into).view(-1)
        for part in stepped.parts:
            saved = self._saved.parameters[part.name]
            if key in saved.pieces:  # torch has no state for a weight that never got a gradient
                saved.copy(key, part.start, flat[part.offset : part.offset + part.size])

    def _state(self, stepped: OptimizerTensor) -> dict[str, Any]:
        """Return the state of one tensor. Padding is zero, as in a new optimizer. No state: it was never stepped."""
        saved = [self._saved.parameters[name] for name in stepped.names]
        keys = sorted({key for each in saved for key in each.pieces} - {WEIGHTS})
        state: dict[str, Any] = {}
        for key in keys:
            values = self._zeros(stepped, self._dtype(key, stepped))
            self._copy(key, stepped, values)
            state[self._format.names.get(key, key)] = values
        if self._same_form:
            own = self._saved.own(self._rank, stepped.first)
            state |= {key: value.to(stepped.tensor.device, copy=True) for key, value in own.items()}
        scalars = self._saved.shared(stepped.first) if state else saved[0].scalars
        for key, value in scalars.items():
            state[key] = self._step(value, stepped) if key == "step" else _copied(value)
        return state

    def _zeros(self, stepped: OptimizerTensor, dtype: Any) -> Any:
        import torch

        if hasattr(self._target.optimizer, "get_state_buffer"):  # bitsandbytes: a paged state stays paged
            return self._target.optimizer.get_state_buffer(stepped.tensor, dtype=dtype)
        return torch.zeros_like(stepped.tensor, dtype=dtype, requires_grad=False)

    def _dtype(self, key: str, stepped: OptimizerTensor) -> Any:
        import torch

        if self._same_form:
            saved = (self._saved.parameters[name] for name in stepped.names)
            return next(each for each in saved if key in each.pieces).stored_dtype(key)
        return stepped.tensor.dtype if self._format.torch else torch.float32

    def _step(self, value: Any, stepped: OptimizerTensor) -> Any:
        """Return a step in the optimizer's format. Each tensor has its own copy, because steps are incremented in place."""
        import torch

        if self._format.torch:
            device = stepped.tensor.device if self._format.beside else "cpu"
            return torch.tensor(float(value), dtype=torch.float32, device=device)
        return int(value) if self._format.host else _copied(value)

    def _set_groups(self) -> None:
        """Set the settings of the optimizer's groups.

        The scheduler sets a learning rate only after a step, so the rate of the next step is part of the state. Some
        optimizers keep more state there. Under another engine, all other settings come from the recipe.
        """
        groups, saved = self._target.groups, self._saved.groups
        if self._same_form and len(groups) == len(saved):
            for group, settings in zip(groups, saved, strict=True):
                for key, value in settings.items():
                    _set(group.settings, key, value)
            return
        rates = self._saved.rates
        if len(groups) != len(rates):  # DeepSpeed merges the groups of torch's Adagrad
            if len(set(rates)) != 1:
                raise RuntimeError(
                    f"the checkpoint has {len(rates)} different learning rates, but the optimizer has {len(groups)} groups"
                )
            rates = rates[:1] * len(groups)
        for group, rate in zip(groups, rates, strict=True):
            _set(group.settings, "lr", rate)


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set one setting of a group, in the type that it has."""
    before: Any = settings.get(key)
    if hasattr(before, "fill_"):
        before.fill_(value)
    elif key != "params":
        settings[key] = tuple(value) if isinstance(before, tuple) else value


def _copied(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value


def schedule_for(saved: SavedState, groups: int) -> dict[str, Any]:
    """Return the scheduler's state for this number of optimizer groups.

    The number can differ, because DeepSpeed drops groups without parameters, such as LoRA's second group.
    """
    state = dict(saved.schedule)
    for key, value in state.items():
        if isinstance(value, list) and len(value) != groups:
            if any(each != value[0] for each in value):
                raise RuntimeError(
                    f"the checkpoint's scheduler has {key} = {value}, but the optimizer has {groups} groups"
                )
            state[key] = value[:1] * groups
    return state


def finish(trainer: Any, engine: str, saved: SavedState, *, step: int) -> None:
    """Update the model's own weights and buffers, the loss scale and DeepSpeed's counters, after the optimizer was filled."""
    _set_buffers(trainer.model, saved)
    if engine not in ("zero2", "zero3"):
        _set_torch_scaler(getattr(trainer.accelerator, "scaler", None), saved)
        return
    zero = trainer.deepspeed.optimizer
    if saved.scaler and zero.dynamic_loss_scale:
        _set_deepspeed_scaler(zero.loss_scaler, saved.scaler)
    if engine == "zero2":
        zero.update_lp_params()
    else:
        _finish_stage_3(zero)
    counts = trainer.deepspeed
    counts.global_steps, counts.global_samples = step, step * counts.train_batch_size()


def _set_buffers(model: Any, saved: SavedState) -> None:
    for name, buffer in model.named_buffers():
        if name in saved.parameters:
            buffer.copy_(saved.parameters[name].weights())


def _set_torch_scaler(scaler: Any, saved: SavedState) -> None:
    if scaler is None or saved.scaler is None:
        return
    fields = {key: value for key, value in saved.scaler.items() if key != "library"}
    if saved.scaler["library"] == "deepspeed":
        fields = {"scale": saved.scaler["cur_scale"]}
    scaler.load_state_dict(scaler.state_dict() | fields)


def _set_deepspeed_scaler(scaler: Any, saved: dict[str, Any]) -> None:
    if saved["library"] == "torch":
        scaler.cur_scale = saved["scale"]
        return
    scaler.cur_scale = saved["cur_scale"]
    scaler.cur_iter = saved["cur_iter"]
    scaler.last_overflow_iter = saved["last_overflow_iter"]
    scaler.cur_hysteresis = saved["cur_hysteresis"]


def _finish_stage_3(zero: Any) -> None:
    """Finish the load as DeepSpeed finishes its own, by loading the tensors that are already in place."""
    import torch.distributed as dist

    zero.checkpoint_event_prologue()
    mine = {
        "loss_scaler": zero.loss_scaler,
        "dynamic_loss_scale": zero.dynamic_loss_scale,
        "overflow": False,
        "fp32_flat_groups": zero.fp32_partitioned_groups_flat,
    }
    zero.load_state_dict([mine] * dist.get_world_size(zero.dp_process_group), load_optimizer_states=False)
    zero.checkpoint_event_epilogue()

"""The mixin that lets a TRL trainer load a checkpoint of another engine or number of processes."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.worker.checkpoint_identity import Identity, step
from trainer.worker.reshard.checkpoint_state import CheckpointState
from trainer.worker.reshard.deepspeed_checkpoint import ZeroState
from trainer.worker.reshard.fill import fill
from trainer.worker.reshard.fsdp_checkpoint import FsdpState
from trainer.worker.reshard.optimizer_layout import find_target, finish_load
from trainer.worker.reshard.replica_checkpoint import ReplicaState

log = logging.getLogger(__name__)


class CheckpointForm(NamedTuple):
    """The form of a checkpoint. An engine loads checkpoints of its own form itself, bit for bit."""

    engine: str
    """`zero2`, `zero3`, `fsdp2`, or `whole` for replicas, whose number does not matter."""
    ranks: int
    offload: tuple[bool, bool]
    """Whether optimizer and parameters are offloaded. The offloaded code has another format of its steps."""

    @classmethod
    def of(cls, identity: Identity) -> CheckpointForm:
        """Return the form of a checkpoint."""
        if identity.engine in ("single", "ddp"):
            return cls("whole", 1, (False, False))
        return cls(
            identity.engine, identity.world_size, (identity.offload_optimizer, identity.offload_parameters)
        )


class ReshardingMixin:
    """Converts the checkpoint if `set_origin` was called with a checkpoint of another form.

    Otherwise everything is as in Transformers.
    """

    origin: Identity | None = None
    converted: bool = False
    identity: Identity

    def set_origin(self, origin: Identity, identity: Identity) -> None:
        """Set what wrote the checkpoint, and what resumes from it. Call it before training."""
        self.origin, self.identity, self.converted = origin, identity, needs_conversion(origin, identity)

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, folder: str | None) -> Any:
        """Replace the load of the checkpoint, which Transformers does at the end of this method."""
        if folder is None or not self.converted:
            return super()._prepare_for_training(max_steps, loader, folder)  # type: ignore[misc]
        prepared = super()._prepare_for_training(max_steps, loader, None)  # type: ignore[misc]
        load_converted(self, Path(folder), self.origin, self.identity)
        self.lr_scheduler.load_state_dict(load_schedule(Path(folder), len(self.lr_scheduler.base_lrs)))
        return prepared

    def _load_from_checkpoint(self: Any, folder: str, model: Any = None) -> None:
        """Load the weights, unless the state is converted: then they come later, with the optimizer's masters."""
        if not self.converted:
            with keep_precision(self.model):
                super()._load_from_checkpoint(folder, model)  # type: ignore[misc]

    def _load_rng_state(self: Any, folder: str | None) -> None:
        """Restore each process's random state; with another number of processes, seed each of them anew."""
        origin = self.origin
        if folder is None or origin is None or origin.world_size == self.args.world_size:
            super()._load_rng_state(folder)  # type: ignore[misc]
        else:
            reseed(self.args.seed, self.state.global_step, self.args.process_index)


def needs_conversion(origin: Identity, identity: Identity) -> bool:
    """Whether a checkpoint has another form than the engine that resumes from it."""
    return CheckpointForm.of(origin) != CheckpointForm.of(identity)


def load_converted(trainer: Any, folder: Path, origin: Identity, identity: Identity) -> None:
    """Set a prepared trainer's weights, optimizer state and learning rates. The scheduler is loaded from its own file.

    Raises:
        UserError: the state cannot be converted for another engine or number of processes, or is of another model.
    """
    began = time.monotonic()
    target = find_target(trainer, identity.engine)
    saved: CheckpointState
    if origin.engine in ("zero2", "zero3"):
        saved = ZeroState(folder, origin)
    else:
        kind = FsdpState if origin.engine == "fsdp2" else ReplicaState
        saved = kind(folder, list_aliases(trainer.model, target.names))
    size = fill(target, saved)
    finish_load(trainer, identity.engine, step=step(folder), scale=saved.loss_scale)
    log.info(
        "converted the checkpoint's state from %s to %s: %.2f GB per process in %.1f s",
        *(origin.words(), identity.words(), size / 1e9, time.monotonic() - began),
    )


@contextmanager
def keep_precision(model: Any) -> Iterator[None]:
    """Restore the dtype of the trained parameters after a load.

    PEFT 0.21 replaces an adapter's parameters by new ones in float32. TRL trains adapters of a quantised model in
    bfloat16 (arXiv:2305.14314, section 3), so the run would resume in another precision.
    """
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if trained.get(name, parameter.dtype) != parameter.dtype:
            parameter.data = parameter.data.to(trained[name])


def load_schedule(folder: Path, groups: int) -> dict[str, Any]:
    """Return the scheduler's state for this number of optimizer groups.

    The number can differ, because DeepSpeed drops groups without parameters, such as LoRA's second group.
    """
    import torch

    state: dict[str, Any] = torch.load(folder / "scheduler.pt", weights_only=True)
    for key, value in state.items():
        if isinstance(value, list) and len(value) != groups:
            if any(each != value[0] for each in value):
                raise RuntimeError(
                    f"the checkpoint's scheduler has {key} = {value}, but the optimizer has {groups} groups"
                )
            state[key] = value[:1] * groups
    return state


def list_aliases(model: Any, names: list[str]) -> list[list[str]]:
    """Return each of `names` with the other names of its parameter. A file has tied weights under any one of them."""
    by_parameter: dict[Any, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter[parameter].append(name)
    groups = {aliases[0]: aliases for aliases in by_parameter.values()}
    return [groups[name] for name in names]


def reseed(seed: int, at_step: int, rank: int) -> None:
    """Seed a rank's random numbers from seed, step and rank. The seed alone would repeat the run's first numbers."""
    from transformers import set_seed

    set_seed(xxhash.xxh3_64_intdigest(f"{seed}/{at_step}/{rank}".encode()) % 2**32)

"""For a TRL trainer: a checkpoint of another form is brought into the engine, in place of the trainer's own load."""

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
from trainer.worker.reshard.optimizer_layout import settle, target
from trainer.worker.reshard.replica_checkpoint import ReplicaState

log = logging.getLogger(__name__)


class ReshardingMixin:
    """Without `goes_on_from`, or from a checkpoint in the engine's own form, all is as in Transformers."""

    came_from: Identity | None = None
    converted: bool = False
    about: Identity

    def goes_on_from(self, theirs: Identity, mine: Identity) -> None:
        """Before it trains: what wrote the checkpoint, and what is to go on from it."""
        self.came_from, self.about, self.converted = theirs, mine, converts(theirs, mine)

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, folder: str | None) -> Any:
        """Transformers loads the checkpoint at the end of this."""
        if folder is None or not self.converted:
            return super()._prepare_for_training(max_steps, loader, folder)  # type: ignore[misc]
        prepared = super()._prepare_for_training(max_steps, loader, None)  # type: ignore[misc]
        bring(self, Path(folder), self.came_from, self.about)
        self.lr_scheduler.load_state_dict(schedule(Path(folder), len(self.lr_scheduler.base_lrs)))
        return prepared

    def _load_from_checkpoint(self: Any, folder: str, model: Any = None) -> None:
        """Weights come later, with the optimizer's masters."""
        if not self.converted:
            with kept_precision(self.model):
                super()._load_from_checkpoint(folder, model)  # type: ignore[misc]

    def _load_rng_state(self: Any, folder: str | None) -> None:
        """Of as many processes each goes on with its own numbers; of others each draws new ones."""
        theirs = self.came_from
        if folder is None or theirs is None or theirs.world_size == self.args.world_size:
            super()._load_rng_state(folder)  # type: ignore[misc]
        else:
            seed_anew(self.args.seed, self.state.global_step, self.args.process_index)


def bring(trainer: Any, folder: Path, theirs: Identity, mine: Identity) -> None:
    """Set a prepared trainer's weights, optimizer and learning rates; the scheduler is its own file.

    Raises:
        UserError: the state cannot be cut for another engine or number of processes, or is not this model's.
    """
    began = time.monotonic()
    ready = target(trainer, mine.engine)
    saved: CheckpointState
    if theirs.engine in ("zero2", "zero3"):
        saved = ZeroState(folder, theirs)
    else:
        kind = FsdpState if theirs.engine == "fsdp2" else ReplicaState
        saved = kind(folder, aliases(trainer.model, ready.names))
    size = fill(ready, saved)
    settle(trainer, mine.engine, step=step(folder), scale=saved.loss_scale)
    log.info(
        "the state of the checkpoint was brought from %s to %s: %.2f GB to each process in %.1f s",
        *(theirs.words(), mine.words(), size / 1e9, time.monotonic() - began),
    )


@contextmanager
def kept_precision(model: Any) -> Iterator[None]:
    """PEFT 0.21 puts new parameters in the place of an adapter's, in float32, and TRL trains those of a quantised model
    in bfloat16 (arXiv:2305.14314, section 3): a run would go on in another precision than it began in.
    """
    trained = {name: each.dtype for name, each in model.named_parameters() if each.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if trained.get(name, parameter.dtype) != parameter.dtype:
            parameter.data = parameter.data.to(trained[name])


def schedule(folder: Path, groups: int) -> dict[str, Any]:
    """The scheduler's state, for as many groups: DeepSpeed drops those without parameters, as LoRA's second is."""
    import torch

    state: dict[str, Any] = torch.load(folder / "scheduler.pt", weights_only=True)
    for key, value in state.items():
        if isinstance(value, list) and len(value) != groups:
            if any(each != value[0] for each in value):
                raise RuntimeError(f"the scheduler's {key} is {value}, for {groups} groups")
            state[key] = value[:1] * groups
    return state


def aliases(model: Any, names: list[str]) -> list[list[str]]:
    """Each of `names` with the other names of the same parameter: of tied weights a file has any one."""
    called: dict[Any, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called[parameter].append(name)
    groups = {each[0]: each for each in called.values()}
    return [groups[name] for name in names]


def seed_anew(seed: int, at_step: int, rank: int) -> None:
    """A rank's random numbers are a function of seed, step and rank; the run's first ones would come again otherwise."""
    from transformers import set_seed

    set_seed(xxhash.xxh3_64_intdigest(f"{seed}/{at_step}/{rank}".encode()) % 2**32)


class Form(NamedTuple):
    """Checkpoints of one form are loaded by the engine itself, bit for bit."""

    engine: str
    """`zero2`, `zero3`, `fsdp2`, or `whole` replicas, of which it does not matter how many there are."""
    ranks: int
    offload: tuple[bool, bool]
    """Of optimizer and parameters: other code steps the same numbers there, and counts its steps otherwise."""

    @classmethod
    def of(cls, one: Identity) -> Form:
        if one.engine in ("single", "ddp"):
            return cls("whole", 1, (False, False))
        return cls(one.engine, one.world_size, (one.offload_optimizer, one.offload_parameters))


def converts(theirs: Identity, mine: Identity) -> bool:
    return Form.of(theirs) != Form.of(mine)

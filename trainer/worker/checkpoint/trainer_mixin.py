"""The mixin that makes a TRL trainer save and load our checkpoints in place of those of each engine's library."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer.staged import TRAINER_STATE_FILE
from trainer.worker import fsdp
from trainer.worker.checkpoint import random_state
from trainer.worker.checkpoint.format import is_format_2, open_format_2
from trainer.worker.checkpoint.format_1 import open_format_1
from trainer.worker.checkpoint.identity import Identity, step
from trainer.worker.checkpoint.load import Filler, finish, schedule_for
from trainer.worker.checkpoint.optimizer_layout import Target, find_target
from trainer.worker.checkpoint.save import CheckpointWriter
from trainer.worker.checkpoint.state import SavedState

log = logging.getLogger(__name__)


class CheckpointForm(NamedTuple):
    """The form of a training's state. A checkpoint of the own form resumes bit for bit."""

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


class CheckpointMixin:
    """A mixin for a TRL trainer. `identity` must be set before `train()`, and `origin` if a run resumes."""

    identity: Identity
    """The identity of this training."""
    origin: Identity | None = None
    """The identity of the checkpoint from which the run resumes."""
    _writer: CheckpointWriter
    _random: dict[str, Any] | None = None
    """The random numbers of this process in the checkpoint; None if the run resumes with another number of processes."""

    def _save_checkpoint(self: Any, _model: Any, _trial: Any) -> None:
        """Write a checkpoint in our format. All ranks call this."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._writer.write(folder)
        self.store_flos()
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / TRAINER_STATE_FILE))

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, folder: str | None) -> Any:
        """Prepare model and optimizer without a checkpoint, and then load it, which Transformers would do by itself."""
        prepared = super()._prepare_for_training(max_steps, loader, None)  # type: ignore[misc]
        if self.args.fsdp:
            fsdp.check(self.model)
        # FSDP2 replaces the parameters of the model during a forward pass, so they are looked up now.
        target = find_target(self, self.identity.engine)
        self._writer = CheckpointWriter(self, self.identity.engine, target)
        if folder is not None:
            saved = load(self, target, Path(folder))
            if self.origin.world_size == self.args.world_size:
                self._random = saved.random(self.args.process_index)
        return prepared

    def load_only(self: Any, folder: Path) -> None:
        """Load the weights of the run's last checkpoint, without training."""
        self._prepare_for_training(step(folder), self.get_train_dataloader(), str(folder))

    def _load_from_checkpoint(self: Any, folder: str, model: Any = None) -> None:
        """Do nothing: the weights are loaded with the optimizer's state, when both are prepared."""

    def _load_rng_state(self: Any, folder: str | None) -> None:
        """Restore each process's random numbers; with another number of processes, seed each of them anew."""
        if self._random is not None:
            random_state.restore(self._random)
        elif folder is not None:
            reseed(self.args.seed, self.state.global_step, self.args.process_index)


def load(trainer: Any, target: Target, folder: Path) -> SavedState:
    """Set a prepared trainer's weights, optimizer, schedule and loss scale, and return the checkpoint's state.

    Raises:
        UserError: the checkpoint is incomplete, is of another model, or cannot be converted for another engine or
            number of processes.
    """
    began = time.monotonic()
    origin, identity = trainer.origin, trainer.identity
    if is_format_2(folder):
        saved = open_format_2(folder)
    else:
        order = list_aliases(trainer.model, target.names)
        saved = open_format_1(folder, origin.engine, origin.world_size, order)
    same_form = CheckpointForm.of(origin) == CheckpointForm.of(identity)
    size = Filler(target, saved, rank=trainer.args.process_index, same_form=same_form).fill()
    finish(trainer, identity.engine, saved, step=step(folder))
    trainer.lr_scheduler.load_state_dict(schedule_for(saved, len(trainer.lr_scheduler.base_lrs)))
    seconds = time.monotonic() - began
    if same_form:
        log.info("loaded the checkpoint's state: %.2f GB per process in %.1f s", size / 1e9, seconds)
    else:
        log.info(
            "converted the checkpoint's state from %s to %s: %.2f GB per process in %.1f s",
            *(origin.words(), identity.words(), size / 1e9, seconds),
        )
    return saved


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

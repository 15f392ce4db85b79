"""Copies the state of a training into a checkpoint's folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.staged import BUFFERS_FOLDER
from trainer.worker.checkpoint import random_state
from trainer.worker.checkpoint.buffers import Buffers, name_of
from trainer.worker.checkpoint.format import (
    INDEX_FILE,
    OWN,
    RANDOM,
    SCALARS_FILE,
    Index,
    IndexedParameter,
    Scalars,
    Slice,
    TensorScalar,
    rank_file,
    scalar_of,
    tensor_name,
)
from trainer.worker.checkpoint.optimizer_layout import OptimizerTensor, Target
from trainer.worker.checkpoint.state import WEIGHTS, deepspeed_scaler, is_per_element, local_shard

PLAIN = (bool, int, float, str, type(None))


class Part(NamedTuple):
    """A slice of a parameter that a rank saves."""

    name: str
    start: int
    size: int
    keys: dict[str, str]
    """The dtype of each of its keys."""


class CheckpointWriter:
    """Saves the checkpoints of one process. It is made when model and optimizer are prepared."""

    def __init__(self, trainer: Any, engine: str, target: Target) -> None:
        """Create the writer.

        Args:
            trainer: TRL's trainer. Its `output_dir` is the folder of staged checkpoints.
            engine: `single`, `ddp`, `zero2`, `zero3` or `fsdp2`.
            target: the optimizer.
        """
        self._trainer = trainer
        self._engine = engine
        self._rank: int = trainer.args.process_index
        self._ranks: int = trainer.args.world_size
        self._target = target
        self._folder = Path(trainer.args.output_dir) / BUFFERS_FOLDER
        self._buffers = Buffers(self._folder, rank_file(self._rank))
        self._untrained = find_untrained(trainer.model, target.names) if self._rank == 0 else {}

    def write(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint; the first rank also writes the index. All ranks must call this.

        Raises:
            UserError: the optimizer has a state that cannot be stored.
            OSError: there is no room.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[Part] = []
        tensors = {tensor_name(RANDOM, name): value for name, value in random_state.capture().items()}
        for stepped in self._share():
            tensors |= self._tensors_of(stepped, parts)
        for name, value in self._untrained.items():
            tensors[tensor_name(WEIGHTS, name)] = value.detach().reshape(-1)
            parts.append(Part(name, 0, value.numel(), {WEIGHTS: name_of(value.dtype)}))
        self._buffers.save(tensors, folder)
        gathered = self._gather(parts)
        if self._rank == 0:
            self._link_model_files(folder)
            write_atomically(folder / SCALARS_FILE, self._scalars().model_dump_json())
            write_atomically(folder / INDEX_FILE, self._index(gathered).model_dump_json())

    def _share(self) -> list[OptimizerTensor]:
        """Return the tensors that this rank saves: its own shards, or its share of a replica."""
        if not self._is_replicated:
            return self._target.stepped
        return share_of(self._target.stepped, self._rank, self._ranks)

    @property
    def _is_replicated(self) -> bool:
        return self._engine in ("single", "ddp")

    def _tensors_of(self, stepped: OptimizerTensor, parts: list[Part]) -> dict[str, Any]:
        """Return the tensors to save, without copying them, and add the slices that they are to `parts`."""
        state = self._target.optimizer.state.get(stepped.tensor, {})
        weights = local_shard(stepped.tensor.detach())
        split, whole = split_state(state, weights.numel())
        split = {WEIGHTS: weights, **split}
        keys = {key: name_of(value.dtype) for key, value in split.items()}
        tensors = {tensor_name(OWN, f"{stepped.first}/{key}"): value for key, value in whole.items()}
        for part in stepped.parts:
            for key, value in split.items():
                flat = value.reshape(-1)[part.offset : part.offset + part.size]
                tensors[tensor_name(key, part.name)] = flat
            parts.append(Part(part.name, part.start, part.size, keys))
        return tensors

    def _gather(self, parts: list[Part]) -> list[list[Part]]:
        """Return the parts of every rank."""
        if self._ranks == 1:
            return [parts]
        import torch.distributed as dist

        found: list[Any] = [None] * self._ranks
        dist.all_gather_object(found, parts)
        return found

    def _index(self, gathered: list[list[Part]]) -> Index:
        """Return the index of all ranks' slices, with the parameters in the optimizer's order."""
        slices: dict[str, list[Slice]] = {}
        keys: dict[str, dict[str, str]] = {}
        for rank, parts in enumerate(gathered):
            for part in parts:
                slices.setdefault(part.name, []).append(
                    Slice(file=rank_file(rank), start=part.start, size=part.size)
                )
                keys[part.name] = part.keys
        shapes = shapes_of(self._trainer.model)
        dtype = self._export_dtype()
        trained = dict.fromkeys(self._target.names, dtype)
        order = [*trained, *(name for name in slices if name not in trained)]
        return Index(
            replicated=self._is_replicated,
            parameters={
                name: IndexedParameter(
                    shape=shapes[name], dtype=trained.get(name), keys=keys[name], slices=tuple(slices[name])
                )
                for name in order
            },
        )

    def _export_dtype(self) -> str | None:
        """Return the model's dtype if the engine has float32 masters of its weights; None for an adapter."""
        if self._is_replicated or hasattr(self._trainer.model, "peft_config"):
            return None
        return name_of(self._trainer.model.config.dtype or "float32")

    def _scalars(self) -> Scalars:
        states: dict[str, dict[str, int | float | TensorScalar]] = {}
        own_keys: set[str] = set()
        for stepped in self._target.stepped:
            state = self._target.optimizer.state.get(stepped.tensor, {})
            count = local_shard(stepped.tensor).numel()
            own_keys |= split_state(state, count)[1].keys()
            values = {key: scalar_of(value) for key, value in state.items() if _is_scalar(value)}
            states |= {name: values for name in stepped.names if values}
        return Scalars(
            groups=tuple(plain_settings(group.settings) for group in self._target.groups),
            schedule=self._trainer.lr_scheduler.state_dict(),
            scaler=scaler_state(self._trainer, self._engine),
            states=states,
            own_keys=tuple(sorted(own_keys)),
        )

    def _link_model_files(self, folder: Path) -> None:
        """Put the model's configs and the tokenizer into the folder. They never change, so they are written once."""
        source = self._folder / "model"
        if not source.is_dir():
            partial = self._folder / "model.partial"
            save_model_files(self._trainer, partial)
            partial.rename(source)
        for path in source.iterdir():
            (folder / path.name).unlink(missing_ok=True)
            os.link(path, folder / path.name)


def share_of(stepped: list[OptimizerTensor], rank: int, ranks: int) -> list[OptimizerTensor]:
    """Return a rank's share of replicated tensors: about the same number of bytes for each rank."""
    loads = [0] * ranks
    mine = set()
    for each in sorted(stepped, key=lambda each: -each.tensor.numel()):
        least = loads.index(min(loads))
        loads[least] += each.tensor.nbytes
        if least == rank:
            mine.add(each.first)
    return [each for each in stepped if each.first in mine]


def split_state(state: Mapping[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors with one value per element, and the other tensors, of an optimizer's state for `count` elements.

    Raises:
        UserError: a value is neither a tensor nor a number.
    """
    split: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for key, value in state.items():
        if _is_scalar(value):
            continue
        if not hasattr(value, "numel"):
            raise UserError(
                f"the optimizer's state `{key}` is a {type(value).__name__}, which a checkpoint cannot store",
                hint="set `optim: adamw_torch`",
            )
        local = local_shard(value)
        (split if is_per_element(local, count) else whole)[key] = local
    return split, whole


def _is_scalar(value: Any) -> bool:
    return getattr(value, "ndim", None) == 0 or isinstance(value, bool | int | float)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an optimizer's group that JSON can hold, without its parameters."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        plain = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(plain, PLAIN) or (
            isinstance(plain, list | tuple) and key != "params" and all(isinstance(x, PLAIN) for x in plain)
        ):
            found[key] = plain
    return found


def scaler_state(trainer: Any, engine: str) -> dict[str, Any] | None:
    """Return the state of float16's loss scaler; None if losses are not scaled."""
    if engine not in ("zero2", "zero3"):
        scaler = getattr(trainer.accelerator, "scaler", None)
        return None if scaler is None else {"library": "torch", **scaler.state_dict()}
    zero = trainer.deepspeed.optimizer
    return deepspeed_scaler(zero.loss_scaler) if zero.dynamic_loss_scale else None


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters and buffers. ZeRO-3 keeps the shape of a partitioned parameter aside."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in named}


def find_untrained(model: Any, trained: list[str]) -> dict[str, Any]:
    """Return what a model saves besides its trained parameters: its frozen ones, and its buffers.

    The base under an adapter is not among them, because it has its own files.

    Raises:
        RuntimeError: a frozen parameter is sharded, and there is no adapter.
    """
    if hasattr(model, "peft_config"):
        return {}
    known = set(trained)
    frozen = {name: each for name, each in model.named_parameters() if name not in known}
    if sharded := [
        name for name, each in frozen.items() if hasattr(each, "ds_shape") or hasattr(each, "to_local")
    ]:
        raise RuntimeError(f"{sharded[0]} is sharded, but not trained")
    # Not `model.state_dict()`: FSDP2 would reshard the model on this rank alone, and the next all-gather hang.
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set  # noqa: SLF001
    }
    return {**frozen, **buffers}


def save_model_files(trainer: Any, folder: Path) -> None:
    """Write the configs of a model or an adapter, and its tokenizer, without weights."""
    model = trainer.model
    folder.mkdir(parents=True, exist_ok=True)
    adapters = getattr(model, "peft_config", {})
    for config in adapters.values():
        finished = copy.copy(config)
        finished.inference_mode = True
        finished.save_pretrained(str(folder))
    if not adapters:
        model.config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    trainer.processing_class.save_pretrained(str(folder))

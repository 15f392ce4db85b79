"""The order of samples: step k trains the same rows, however the global batch is split over ranks and micro batches.

The order of an epoch depends only on seed, epoch and data. An epoch has `rows // global_batch_size` steps, as the
estimate counts them, and every step has the full batch. The rows that are left over at the end of an epoch are not
trained in this epoch; in other epochs other rows are left over. Transformers would give the last step fewer rows on one
process, and repeat rows on several. If there are fewer rows than one batch, they are repeated, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.recipe import Recipe
from trainer.recipe.model import may_sort

log = logging.getLogger(__name__)
Numbers = np.ndarray[Any, np.dtype[np.int64]]
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Constants of SplitMix64 (https://doi.org/10.1145/2660193.2660195, https://prng.di.unimi.it/splitmix64.c).

The shuffle is written here because a library's shuffle may change with its version. A run that resumes in the middle of
an epoch would then get another order for the rest of it.
"""


class Split(NamedTuple):
    """How a global batch is split."""

    processes: int
    micro_batch: int
    accumulation: int

    @property
    def batch(self) -> int:
        return self.processes * self.micro_batch * self.accumulation


def shuffled(rows: int, *, seed: int, epoch: int, data: str) -> Numbers:
    """Return a permutation of `range(rows)`: each row draws a 64-bit number, and rows are sorted by it."""
    start = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{epoch}/{data}".encode()))
    drawn = start + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # modulo 2 ** 64
    for shift, factor in MIX:
        drawn = (drawn ^ (drawn >> np.uint64(shift))) * np.uint64(factor)
    order: Numbers = np.argsort(drawn ^ (drawn >> np.uint64(31)), kind="stable")
    return order


def dealt(order: Numbers, batch: int, lengths: Numbers | None) -> Numbers:
    """Return row numbers of shape (steps, batch).

    With `lengths`, the longest rows of a batch come first. Then rows of similar length share a micro batch, and the ranks
    compute rows of similar length at the same time, so padding is small. The set of rows of a batch stays the same.
    """
    steps = max(1, len(order) // batch)
    rows: Numbers = np.resize(order, (steps, batch))  # repeats rows if there are too few
    if lengths is None:
        return rows
    return np.take_along_axis(rows, np.argsort(-lengths[rows], axis=1, kind="stable"), axis=1)


class Batches:
    """The batch sampler of one rank: yields the row numbers of its micro batches."""

    def __init__(
        self, rows: int, split: Split, *, rank: int, seed: int, data: str, lengths: Numbers | None = None
    ) -> None:
        if rows < split.batch:
            log.warning("%d training rows are repeated to fill the global batch of %d", rows, split.batch)
        self.sequential = False
        self._rows, self._split, self._rank = rows, split, rank
        self._seed, self._data, self._lengths = seed, data, lengths
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return max(1, self._rows // self._split.batch) * self._split.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        split = self._split
        steps = self.steps()
        for number in range(len(self)):
            step, part = divmod(number, split.accumulation)
            first = (part * split.processes + self._rank) * split.micro_batch
            yield steps[step, first : first + split.micro_batch].tolist()

    def steps(self) -> Numbers:
        """Return the rows of the epoch, of shape (steps, global batch). They are the same on every rank."""
        if self.sequential:
            order: Numbers = np.arange(self._rows)
        else:
            order = shuffled(self._rows, seed=self._seed, epoch=self._epoch, data=self._data)
        return dealt(order, self._split.batch, self._lengths)


def lengths_of(dataset: Any) -> Numbers:
    """Return the number of tokens of each row; for a pair, of its longer half, to which the collator pads."""
    import pyarrow.compute as pc  # type: ignore[import-untyped,import-not-found,unused-ignore]

    def of(column: str) -> Numbers:
        lists = dataset.select_columns([column]).with_format("arrow")[:][column]
        return np.asarray(pc.list_value_length(lists), dtype=np.int64)

    if "input_ids" in dataset.column_names:
        return of("input_ids")
    return of("prompt_ids") + np.maximum(of("chosen_ids"), of("rejected_ids"))


class DeterministicOrderMixin:
    """A mixin for a TRL trainer that replaces its sampler by `Batches`. `order` must be set before `train()`."""

    order: tuple[Recipe, str]
    """The recipe, and the fingerprint of the training data."""

    def get_train_dataloader(self: Any) -> Any:
        """Return a loader of this rank's rows. Accelerate does not wrap it; the Trainer moves the tensors to the device."""
        import torch
        from torch.utils.data import DataLoader

        args, (recipe, data) = self.args, self.order
        batches = Batches(
            len(self.train_dataset),
            Split(args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps),
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            data=data,
            lengths=lengths_of(self.train_dataset) if may_sort(recipe) else None,
        )
        batches.sequential = args.train_sampling_strategy == "sequential"
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # its own generator, because the loader draws a number at the start of each epoch
        )
        # The Trainer calls this. After skipped batches it finds `batches` itself.
        loader.set_epoch = batches.set_epoch
        return loader

"""One order of samples, whatever trains them: step k holds the same rows on every split of the global batch.

An epoch's order is a function of seed, epoch and data alone. The rows that fill no global batch at its end wait for
another epoch, in which they are others: every step has the recipe's batch, and the steps of an epoch are
`rows // global_batch_size`, as the estimate counts them. Transformers would give the last step of an epoch fewer rows
on one process, and rows twice on several. Fewer rows than one batch are repeated until they fill it, and it is said.
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
"""SplitMix64 (https://doi.org/10.1145/2660193.2660195; the constants: https://prng.di.unimi.it/splitmix64.c). A
library's shuffle may change with its version, and with it the rest of an epoch that was begun with the older one."""


class Split(NamedTuple):
    """How a global batch is cut."""

    processes: int
    micro_batch: int
    accumulation: int

    @property
    def batch(self) -> int:
        return self.processes * self.micro_batch * self.accumulation


def shuffled(rows: int, *, seed: int, epoch: int, data: str) -> Numbers:
    """A permutation of `range(rows)`: the order of 64-bit numbers that each row draws."""
    start = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{epoch}/{data}".encode()))
    drawn = start + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # modulo 2 ** 64
    for shift, factor in MIX:
        drawn = (drawn ^ (drawn >> np.uint64(shift))) * np.uint64(factor)
    order: Numbers = np.argsort(drawn ^ (drawn >> np.uint64(31)), kind="stable")
    return order


def dealt(order: Numbers, batch: int, lengths: Numbers | None) -> Numbers:
    """Row numbers, (steps, batch). With `lengths` the longest of a batch come first: neighbours share a micro batch,
    and the ranks compute alike long ones at a time, so little is padding. The batch is the same set.
    """
    steps = max(1, len(order) // batch)
    rows: Numbers = np.resize(order, (steps, batch))  # of too few rows it repeats them
    if lengths is None:
        return rows
    return np.take_along_axis(rows, np.argsort(-lengths[rows], axis=1, kind="stable"), axis=1)


class Batches:
    """The micro batches of one rank, as lists of row numbers: what a `DataLoader` takes as its `batch_sampler`."""

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
        """The epoch's rows, (steps, global batch): the same on every rank."""
        if self.sequential:
            order: Numbers = np.arange(self._rows)
        else:
            order = shuffled(self._rows, seed=self._seed, epoch=self._epoch, data=self._data)
        return dealt(order, self._split.batch, self._lengths)


def lengths_of(dataset: Any) -> Numbers:
    """Tokens of each row as the collator pads it; of a pair those of its longer half."""
    import pyarrow.compute as pc  # type: ignore[import-untyped,import-not-found,unused-ignore]

    def of(column: str) -> Numbers:
        lists = dataset.select_columns([column]).with_format("arrow")[:][column]
        return np.asarray(pc.list_value_length(lists), dtype=np.int64)

    if "input_ids" in dataset.column_names:
        return of("input_ids")
    return of("prompt_ids") + np.maximum(of("chosen_ids"), of("rejected_ids"))


class DeterministicOrderMixin:
    """For a TRL trainer: the order above in place of its own. `order` is set before it trains."""

    order: tuple[Recipe, str]
    """The recipe, and the fingerprint of the training data."""

    def get_train_dataloader(self: Any) -> Any:
        """Nothing is handed to Accelerate: each rank reads its own rows and no others, and the Trainer moves them."""
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
            generator=torch.Generator(),  # its own: it draws a number at each epoch's start
        )
        loader.set_epoch = (
            batches.set_epoch
        )  # the Trainer calls it; after a skip it finds `batches` by itself
        return loader

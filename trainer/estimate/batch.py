"""What one process computes at a time: sequences, their length with padding, and the steps that there are."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

from trainer.estimate.workload import Workload
from trainer.memory import Layout
from trainer.recipe import Recipe

TRAINER_EPOCHS = 3.0
"""Of TrainingArguments (https://huggingface.co/docs/transformers)."""


class MicroBatch(NamedTuple):
    """A micro batch, in sequences: a DPO pair is two. Of those that a step has, the mean."""

    sequences: int
    length: float
    """Of every sequence, padding included, tokens."""
    square: float
    """Of that length, on average over the step's micro batches."""
    real: float
    """Tokens of it that are not padding."""
    accumulation: int
    """Micro batches to an optimizer step."""
    processes: int

    @property
    def tokens(self) -> float:
        """That are computed, padding included."""
        return self.sequences * self.length

    def of_length(self, length: float) -> MicroBatch:
        """The same of sequences that are all of one length."""
        return self._replace(length=length, square=length**2)


def batch(recipe: Recipe, layout: Layout, workload: Workload, *, in_order: bool) -> MicroBatch:
    """The micro batch of a recipe under a layout.

    Packed rows are full. Others are padded to the longest of the micro batch, chosen and rejected together.

    Args:
        recipe: whose `max_length` cuts rows.
        layout: which shares the rows out.
        workload: how long they are.
        in_order: whether a global batch is dealt by length (`trainer.worker.sampling`), or rows meet by chance.
    """
    each = recipe.training_method.sequences_per_row
    sequences = layout.micro_batch * each
    limit = recipe.max_length
    mean = min(workload.tokens / each, float(limit))
    of_step = layout.micro_batch * layout.processes
    found = MicroBatch(
        sequences=sequences,
        length=limit,
        square=limit**2,
        real=sequences * (limit if recipe.is_packed else mean),
        accumulation=max(1, recipe.global_batch_size // of_step),
        processes=layout.processes,
    )
    if recipe.is_packed:
        return found
    if not in_order:
        return found.of_length(padded(mean, workload.spread, sequences, limit))
    rows = mean if each == 1 else longer_half(mean, workload.spread, limit)
    dealt = by_length(rows, workload.spread, found.accumulation * of_step, limit)
    longest = dealt[::of_step]  # the first row of the first rank, which all ranks wait for
    return found._replace(
        length=sum(longest) / len(longest), square=sum(each**2 for each in longest) / len(longest)
    )


def steps(recipe: Recipe, workload: Workload) -> int:
    """Optimizer steps of a run; the rest of an epoch that fills no batch is left out, and a part of an epoch is
    rounded up to whole steps, as the Trainer does.
    """
    most = int(recipe.trainer_args.get("max_steps") or 0)
    if most > 0:
        return most
    epochs = float(recipe.trainer_args.get("num_train_epochs") or TRAINER_EPOCHS)
    return max(1, math.ceil(epochs * max(1, rows(recipe, workload) // recipe.global_batch_size)))


def rows(recipe: Recipe, workload: Workload) -> int:
    """What an epoch has to train on: rows, or the full rows that they are packed into."""
    if recipe.is_packed:
        return max(1, math.ceil(workload.rows * workload.tokens / recipe.max_length))
    return workload.rows


def evaluations(recipe: Recipe, total_steps: int) -> int:
    """How often a run evaluates."""
    arguments = recipe.trainer_args
    strategy = str(arguments.get("eval_strategy") or "no")
    if strategy == "steps":
        every = float(arguments.get("eval_steps") or arguments.get("logging_steps") or 500)
        return int(total_steps // every_steps(every, total_steps))
    return math.ceil(float(arguments.get("num_train_epochs") or TRAINER_EPOCHS)) if strategy == "epoch" else 0


def saves(recipe: Recipe, total_steps: int) -> int:
    """How often a run saves."""
    strategy = str(recipe.trainer_args.get("save_strategy") or "steps")
    if strategy == "steps":
        return int(
            total_steps // every_steps(float(recipe.trainer_args.get("save_steps") or 500), total_steps)
        )
    return 0 if strategy == "no" else 1


def every_steps(value: float, total_steps: int) -> int:
    """`eval_steps` and `save_steps`; below 1 they are a part of the run."""
    return max(1, math.ceil(value * total_steps) if value < 1 else int(value))


LONGER_HALF = 0.15
"""Deviations by which the longer half of a pair exceeds the mean of both, measured: of 199 pairs of LLaMA-Factory's
dpo_en_demo, bytes / 4.2, 0.13 to 0.21 (cut to 2048, 1024 and 512). Halves that knew nothing of each other would have 0.56;
the prompt is the same in both."""
SHORTEST = 0.05
"""Cube root of the shortest row, as a part of the mean: there are no empty ones."""
ROUNDS = 50
"""Halvings: to the last bits of a length."""


def padded(mean: float, spread: float, count: int, limit: int) -> int:
    """The longest of `count` sequences, expected.

    The maximum of normal values lies some deviations above their mean: the quantile (n - 3/8) / (n + 1/4)
    (Blom 1958, https://doi.org/10.1093/biomet/46.3-4.510, a review). Truncation caps it.
    """
    above = NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0
    return max(1, min(limit, math.ceil(mean * (1 + spread * above))))


def longer_half(mean: float, spread: float, limit: int) -> float:
    """Mean of the longer halves of pairs, tokens."""
    return min(float(limit), mean * (1 + LONGER_HALF * spread))


@lru_cache(maxsize=64)
def by_length(mean: float, spread: float, count: int, limit: int) -> tuple[float, ...]:
    """Lengths of `count` rows that lie in order, the longest first, expected: their mean is `mean`.

    Lengths are above nothing and lean to the right: a gamma distribution of that spread, its quantiles by Wilson and
    Hilferty (1931, https://doi.org/10.1073/pnas.17.12.684), at the places of Blom, as above. All are stretched until their
    mean, with what is beyond the limit cut to it, is the one that is given.
    """
    if mean >= limit:
        return (float(limit),) * count
    places = ((count - at - 0.375) / (count + 0.25) for at in range(count))
    quantiles = [_gamma(NormalDist().inv_cdf(place), spread) for place in places]
    low, high = 0.0, limit / quantiles[-1]
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        short = sum(min(limit, middle * each) for each in quantiles) < mean * count
        low, high = (middle, high) if short else (low, middle)
    return tuple(min(float(limit), high * each) for each in quantiles)


def _gamma(deviations: float, spread: float) -> float:
    """Of mean 1: the value that lies as far in the distribution as so many deviations do in the normal one."""
    square = spread**2 / 9
    return max(SHORTEST, 1 - square + deviations * math.sqrt(square)) ** 3

"""The micro batch that one process computes at a time, the expected lengths of its sequences, and the counts of
optimizer steps, evaluations and saves of a run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

from trainer.estimate.workload import Workload
from trainer.memory import Layout
from trainer.recipe import Recipe

TRAINER_EPOCHS = 3.0
"""The default `num_train_epochs` of TrainingArguments (https://huggingface.co/docs/transformers)."""
LONGER_HALF = 0.15
"""The difference between the longer half of a pair and the mean of both halves, in standard deviations. Measured on 199 pairs of
LLaMA-Factory's dpo_en_demo, bytes / 4.2: 0.13 to 0.21 (truncated to 2048, 1024 and 512). Independent halves would have
0.56, but both contain the same prompt."""
SHORTEST = 0.05
"""Cube root of the shortest row's length, as a part of the mean. It keeps lengths above 0."""
ROUNDS = 50
"""Bisection steps, enough for the last bits of a length."""


class MicroBatch(NamedTuple):
    """The mean of the micro batches of a step. It counts sequences: a DPO pair has two."""

    sequences: int
    length: float
    """Tokens of every sequence, padding included."""
    square: float
    """Mean of the squared length over the step's micro batches."""
    real: float
    """Tokens of the micro batch that are not padding."""
    accumulation: int
    """Micro batches per optimizer step and process."""
    processes: int

    @property
    def tokens(self) -> float:
        """Tokens that are computed, padding included."""
        return self.sequences * self.length

    def of_length(self, length: float) -> MicroBatch:
        """Return a copy in which every sequence has this length."""
        return self._replace(length=length, square=length**2)


def make_micro_batch(recipe: Recipe, layout: Layout, workload: Workload, *, in_order: bool) -> MicroBatch:
    """Return the mean micro batch of a recipe under a layout.

    Packed rows are full. Other rows are padded to the longest of the micro batch, with the chosen and rejected
    sequences of DPO in one batch.

    Args:
        recipe: its `max_length` truncates the rows.
        layout: how the rows are split over the processes.
        workload: how long the rows are.
        in_order: whether a global batch is sorted by length (`trainer.worker.sampling`) or in random order.
    """
    per_row = recipe.training_method.sequences_per_row
    sequences = layout.micro_batch * per_row
    limit = recipe.max_length
    mean = min(workload.tokens / per_row, float(limit))
    rows_at_once = layout.micro_batch * layout.processes
    full = MicroBatch(
        sequences=sequences,
        length=limit,
        square=limit**2,
        real=sequences * (limit if recipe.is_packed else mean),
        accumulation=max(1, recipe.global_batch_size // rows_at_once),
        processes=layout.processes,
    )
    if recipe.is_packed:
        return full
    if not in_order:
        return full.of_length(expect_longest(mean, workload.spread, sequences, limit))
    row_length = mean if per_row == 1 else expect_longer_half(mean, workload.spread, limit)
    lengths = expect_lengths(row_length, workload.spread, full.accumulation * rows_at_once, limit)
    longest = lengths[::rows_at_once]  # the first row of the first rank, which all ranks wait for
    return full._replace(
        length=sum(longest) / len(longest), square=sum(length**2 for length in longest) / len(longest)
    )


def count_steps(recipe: Recipe, workload: Workload) -> int:
    """Return the optimizer steps of a run, counted as the Trainer does.

    The last rows of an epoch that do not fill a batch are dropped. A fraction of an epoch is rounded up to whole steps.
    """
    most = int(recipe.trainer_args.get("max_steps") or 0)
    if most > 0:
        return most
    epochs = float(recipe.trainer_args.get("num_train_epochs") or TRAINER_EPOCHS)
    return max(1, math.ceil(epochs * max(1, count_rows(recipe, workload) // recipe.global_batch_size)))


def count_rows(recipe: Recipe, workload: Workload) -> int:
    """Return the rows of an epoch, or the number of full sequences that they are packed into."""
    if recipe.is_packed:
        return max(1, math.ceil(workload.rows * workload.tokens / recipe.max_length))
    return workload.rows


def count_evaluations(recipe: Recipe, total_steps: int) -> int:
    """Return how often a run evaluates."""
    arguments = recipe.trainer_args
    strategy = str(arguments.get("eval_strategy") or "no")
    if strategy == "steps":
        every = float(arguments.get("eval_steps") or arguments.get("logging_steps") or 500)
        return int(total_steps // interval_steps(every, total_steps))
    return math.ceil(float(arguments.get("num_train_epochs") or TRAINER_EPOCHS)) if strategy == "epoch" else 0


def count_saves(recipe: Recipe, total_steps: int) -> int:
    """Return how often a run saves."""
    strategy = str(recipe.trainer_args.get("save_strategy") or "steps")
    if strategy == "steps":
        every = float(recipe.trainer_args.get("save_steps") or 500)
        return int(total_steps // interval_steps(every, total_steps))
    return 0 if strategy == "no" else 1


def interval_steps(value: float, total_steps: int) -> int:
    """Return `eval_steps` or `save_steps` as a number of steps. A value below 1 is a fraction of the run."""
    return max(1, math.ceil(value * total_steps) if value < 1 else int(value))


def expect_longest(mean: float, spread: float, count: int, limit: int) -> int:
    """Return the expected tokens of the longest of `count` sequences in random order.

    The maximum of normal values is at the quantile (n - 3/8) / (n + 1/4) (Blom 1958,
    https://doi.org/10.1093/biomet/46.3-4.510, a review). Truncation to `limit` caps it.
    """
    above = NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0
    return max(1, min(limit, math.ceil(mean * (1 + spread * above))))


def expect_longer_half(mean: float, spread: float, limit: int) -> float:
    """Return the mean tokens of the longer halves of pairs."""
    return min(float(limit), mean * (1 + LONGER_HALF * spread))


@lru_cache(maxsize=64)
def expect_lengths(mean: float, spread: float, count: int, limit: int) -> tuple[float, ...]:
    """Return the expected tokens of `count` sorted rows, the longest first. Their mean is `mean`.

    Lengths are positive and skewed to the right, so they follow a gamma distribution with this spread. Its quantiles
    are those of Wilson and Hilferty (1931, https://doi.org/10.1073/pnas.17.12.684) at Blom's positions, as in
    `expect_longest`. All lengths are scaled until their mean, after truncation to `limit`, is `mean`.
    """
    if mean >= limit:
        return (float(limit),) * count
    places = ((count - at - 0.375) / (count + 0.25) for at in range(count))
    quantiles = [_gamma_quantile(NormalDist().inv_cdf(place), spread) for place in places]
    low, high = 0.0, limit / quantiles[-1]
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        short = sum(min(limit, middle * each) for each in quantiles) < mean * count
        low, high = (middle, high) if short else (low, middle)
    return tuple(min(float(limit), high * each) for each in quantiles)


def _gamma_quantile(deviations: float, spread: float) -> float:
    """Return the quantile of a gamma distribution of mean 1 at the same probability as `deviations` of a normal one."""
    square = spread**2 / 9
    return max(SHORTEST, 1 - square + deviations * math.sqrt(square)) ** 3

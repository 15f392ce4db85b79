"""The rows and tokens that a recipe trains on: from a table of known data sets, or guessed from the size of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from trainer.recipe import DataSource, Recipe

BYTES_PER_TOKEN = 4.0
"""For English prose and tokenizers of 32,000 to 128,000 words. Code and other languages have fewer bytes per token."""
USUAL_SPREAD = 0.56
"""Standard deviation of a length over its mean. Measured on the answers of 199 pairs of LLaMA-Factory's dpo_en_demo,
bytes / 4.2, truncated to 1024."""


class Workload(BaseModel):
    """The rows that a recipe trains on in one epoch, and how long they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(gt=0)
    """Chats (SFT) or pairs (DPO) of the training split, after `weight` and `max_train_samples`."""
    tokens: float = Field(gt=0)
    """Mean tokens per row after truncation. A pair counts both of its sequences, each with the prompt."""
    spread: float = Field(default=USUAL_SPREAD, ge=0)
    """Standard deviation of a sequence's length over its mean. It decides how much padding a batch has."""
    test_rows: int = Field(default=0, ge=0)
    """Rows of each evaluation; 0 if the recipe has no test data."""
    source: str
    """Where the numbers come from, as text for a plan."""


class _Known(NamedTuple):
    rows: Mapping[str, int]
    """Rows by split."""
    tokens: float
    """Mean tokens per sequence before truncation."""
    spread: float
    source: str


_FEEDBACK = 478.0
"""Tokens of one UltraFeedback sequence, derived from two data sets with the same rows. One has 3199 bytes per row
(instruction and both answers: argilla's card), the other 6411 (four prompts, two chosen, one rejected: HuggingFaceH4's
card of 2023). So a prompt has some 616 bytes and an answer 1262. That is at 4.1 bytes per token, plus 20 tokens of
template."""
_CARDS = "https://huggingface.co/datasets"
KNOWN: Mapping[str, _Known] = {
    "HuggingFaceH4/ultrachat_200k": _Known(
        rows={"train_sft": 207_865, "test_sft": 23_110},
        tokens=1374,
        spread=0.55,
        source=f"{_CARDS}/HuggingFaceH4/ultrachat_200k; tokens from zephyr-7b-sft-full, 24.861 rows of 2048 a second "
        "for 5608 s",
    ),
    "HuggingFaceH4/ultrafeedback_binarized": _Known(
        rows={"train_prefs": 61_135, "test_prefs": 2_000, "train_sft": 61_135, "test_sft": 1_000},
        tokens=_FEEDBACK,
        spread=USUAL_SPREAD,
        source=f"{_CARDS}/HuggingFaceH4/ultrafeedback_binarized; tokens from its bytes",
    ),
    "argilla/ultrafeedback-binarized-preferences": _Known(
        rows={"train": 63_619},
        tokens=_FEEDBACK,
        spread=USUAL_SPREAD,
        source=f"{_CARDS}/argilla/ultrafeedback-binarized-preferences; rows as notus-7b-v1-lora counted them",
    ),
    "openbmb/UltraFeedback": _Known(
        rows={"train": 63_619},
        tokens=_FEEDBACK,
        spread=USUAL_SPREAD,
        source=f"{_CARDS}/openbmb/UltraFeedback; pairs left by ratings as in argilla's, ties dropped",
    ),
    "generated:chats": _Known(
        rows={"train": 520, "test": 104},
        tokens=25,
        spread=0.2,
        source="counted in trainer/worker/synthetic.py",
    ),
    "generated:preferences": _Known(
        rows={"train": 260, "test": 52},
        tokens=25,
        spread=0.2,
        source="counted in trainer/worker/synthetic.py",
    ),
}
"""By Hub id. Ultrachat's mean is of rows truncated to 2048 tokens; few rows are longer."""


def known_workload(recipe: Recipe) -> Workload | None:
    """Return the workload of a recipe from the table of known data sets; None if a data set is not in it."""
    mixture = recipe.dataset_mixture
    train = [_rows(source) for source in mixture.datasets]
    if not all(train):
        return None
    total = sum(train)
    test = sum(_rows(source) for source in mixture.test_datasets)
    if mixture.test_split_size:
        test = _split_off(mixture.test_split_size, total)
        total -= test
    known = [KNOWN[source.id] for source in mixture.datasets]
    tokens = sum(each.tokens * count for each, count in zip(known, train, strict=True)) / sum(train)
    spread = max(each.spread for each in known)
    return _workload(
        recipe,
        rows=total,
        test=test,
        tokens=tokens,
        spread=spread,
        source="; ".join({k.source: None for k in known}),
    )


def full_workload(recipe: Recipe, rows: int, origin: str) -> Workload:
    """Return the workload of rows of unknown length. Every row is assumed to have the maximum length.

    `origin` is text for the plan: where the number of rows comes from.
    """
    sequences = recipe.training_method.sequences_per_row
    longest = recipe.max_length
    return Workload(
        rows=rows,
        tokens=sequences * longest,
        spread=0.0,
        source=f"{origin}, each assumed to have the full `max_length` of {longest} tokens",
    )


def usual_workload(recipe: Recipe) -> Workload:
    """Return the workload by which a fit is chosen. It depends on the recipe alone.

    The laptop and every attempt have to choose the same fit, whether or not they have read the data. The number of
    rows is a placeholder if the data set is not known.
    """
    return known_workload(recipe) or full_workload(recipe, recipe.global_batch_size, "one step")


def counted_workload(recipe: Recipe, *, rows: int, size_bytes: int, test_rows: int = 0) -> Workload:
    """Return the workload of local files. The caller has counted the rows; the tokens are guessed from the bytes.

    Args:
        recipe: its `max_length` truncates the rows.
        rows: lines of a text file, or rows of a table.
        size_bytes: size of the text.
        test_rows: rows of each evaluation.
    """
    sequences = recipe.training_method.sequences_per_row
    tokens = size_bytes / max(rows, 1) / BYTES_PER_TOKEN / sequences
    source = f"{rows} rows of {size_bytes / max(rows, 1):.0f} bytes, guessed at {BYTES_PER_TOKEN:.0f} bytes per token"
    return _workload(recipe, rows=rows, test=test_rows, tokens=tokens, spread=USUAL_SPREAD, source=source)


def truncate_mean(mean: float, spread: float, limit: int) -> float:
    """Return the mean of normally distributed lengths after truncation: the mean minus E[(X - limit)+]."""
    if not spread:
        return min(mean, limit)
    normal = NormalDist(mean, spread * mean)
    above = (mean - limit) * (1 - normal.cdf(limit)) + normal.variance * normal.pdf(limit)
    return max(1.0, min(mean - above, limit))


def _workload(recipe: Recipe, *, rows: int, test: int, tokens: float, spread: float, source: str) -> Workload:
    truncated_tokens = tokens if recipe.is_packed else truncate_mean(tokens, spread, recipe.max_length)
    return Workload(
        rows=max(1, min(rows, recipe.max_train_samples or rows)),
        tokens=max(1.0, truncated_tokens * recipe.training_method.sequences_per_row),
        spread=spread,
        test_rows=min(test, test if recipe.max_test_samples is None else recipe.max_test_samples),
        source=source,
    )


def _rows(source: DataSource) -> int:
    known = KNOWN.get(source.id)
    return math.floor((known.rows.get(source.split, 0) if known else 0) * source.weight)


def _split_off(size: float, total: int) -> int:
    return int(size) if size >= 1 else int(size * total)

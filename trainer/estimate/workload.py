"""How much data a recipe has: rows and tokens, known, or guessed from the size of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from trainer.recipe import DataSource, Recipe

BYTES_PER_TOKEN = 4.0
"""English prose in tokenizers of 32,000 to 128,000 words; code and other languages have fewer bytes to a token."""
USUAL_SPREAD = 0.56
"""Measured: the answers of 199 pairs of LLaMA-Factory's dpo_en_demo, bytes / 4.2, cut to 1024."""


class Workload(BaseModel):
    """The rows that a recipe trains on in one epoch, and how long they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(gt=0)
    """Chats (SFT) or pairs (DPO) of the training split, after `weight` and `max_train_samples`."""
    tokens: float = Field(gt=0)
    """Mean of a row, after truncation: of a chat, or of both sequences of a pair together, prompt included twice."""
    spread: float = Field(default=USUAL_SPREAD, ge=0)
    """Standard deviation of one sequence's length, as a part of its mean: how much padding a batch has."""
    test_rows: int = Field(default=0, ge=0)
    """Rows of each evaluation; 0 without one."""
    source: str
    """Where the numbers come from, in words that a plan can show."""


class _Known(NamedTuple):
    rows: Mapping[str, int]
    """By split."""
    tokens: float
    """Mean of one sequence, before truncation."""
    spread: float
    source: str


_FEEDBACK = 478.0
"""Tokens of one UltraFeedback sequence. Derived: two data sets of the same rows are 3199 bytes a row (instruction and
both answers: argilla's card) and 6411 (four prompts, two chosen, one rejected: HuggingFaceH4's card of 2023), so a
prompt has some 616 bytes and an answer 1262; at 4.1 bytes a token, and 20 tokens of template."""
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
"""By Hub id. Ultrachat's tokens are already cut to 2048 where a row was longer; few are."""


def known_workload(recipe: Recipe) -> Workload | None:
    """Of a recipe whose data sets are all known; None if one is not."""
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


def full_workload(recipe: Recipe, rows: int, said: str) -> Workload:
    """Of rows that nobody knows more of than their number, and who said it: they are taken to be as long as may be."""
    sequences = recipe.training_method.sequences_per_row
    longest = recipe.max_length
    return Workload(
        rows=rows,
        tokens=sequences * longest,
        spread=0.0,
        source=f"{said}, each of them taken to fill `max_length` {longest}",
    )


def usual_workload(recipe: Recipe) -> Workload:
    """What follows of the recipe alone, whether or not its data lie here or were read: the laptop and every attempt
    are to choose the same fit. Its rows are not to be counted on.
    """
    return known_workload(recipe) or full_workload(recipe, recipe.global_batch_size, "one step")


def counted_workload(recipe: Recipe, *, rows: int, size_bytes: int, test_rows: int = 0) -> Workload:
    """Of files at hand, whose rows the caller has counted; their tokens are guessed from their bytes.

    Args:
        recipe: whose `max_length` cuts them.
        rows: lines, or rows of a table.
        size_bytes: of the text.
        test_rows: of each evaluation.
    """
    sequences = recipe.training_method.sequences_per_row
    tokens = size_bytes / max(rows, 1) / BYTES_PER_TOKEN / sequences
    words = f"{rows} rows of {size_bytes / max(rows, 1):.0f} bytes, at {BYTES_PER_TOKEN:.0f} bytes a token: a guess"
    return _workload(recipe, rows=rows, test=test_rows, tokens=tokens, spread=USUAL_SPREAD, source=words)


def truncated(mean: float, spread: float, limit: int) -> float:
    """Mean of lengths that are cut at a limit, as if they were normal: less E[(X - limit)+]."""
    if not spread:
        return min(mean, limit)
    normal = NormalDist(mean, spread * mean)
    above = (mean - limit) * (1 - normal.cdf(limit)) + normal.variance * normal.pdf(limit)
    return max(1.0, min(mean - above, limit))


def _workload(recipe: Recipe, *, rows: int, test: int, tokens: float, spread: float, source: str) -> Workload:
    cut = tokens if recipe.is_packed else truncated(tokens, spread, recipe.max_length)
    return Workload(
        rows=max(1, min(rows, recipe.max_train_samples or rows)),
        tokens=max(1.0, cut * recipe.training_method.sequences_per_row),
        spread=spread,
        test_rows=min(test, test if recipe.max_test_samples is None else recipe.max_test_samples),
        source=source,
    )


def _rows(source: DataSource) -> int:
    known = KNOWN.get(source.id)
    return math.floor((known.rows.get(source.split, 0) if known else 0) * source.weight)


def _split_off(size: float, total: int) -> int:
    return int(size) if size >= 1 else int(size * total)

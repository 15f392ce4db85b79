"""Tests of padding, for rows in random order and rows sorted by length, compared with drawn lengths."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.estimate import Workload
from trainer.estimate.batch import expect_lengths, expect_longer_half, expect_longest, make_micro_batch
from trainer.memory import Layout
from trainer.recipe import Recipe

BATCH = 128


def drawn(mean: float, spread: float, limit: int) -> float:
    """Draw a length like those of texts: positive, some of them long, truncated at the limit."""
    return min(float(limit), random.gammavariate(1 / spread**2, mean * spread**2))


@pytest.mark.parametrize("together", [1, 2, 8, 32, 128], ids=lambda count: f"{count} at a time")
@pytest.mark.parametrize(("mean", "spread", "limit"), [(300, 0.56, 4096), (600, 0.8, 1024), (900, 0.3, 1024)])
def test_what_is_dealt_by_length_is_padded_as_drawn_batches_are(
    together: int, mean: float, spread: float, limit: int
) -> None:
    """Mean and mean square of the longest rows of a sorted batch's slices, over two thousand batches."""
    random.seed(0)
    draws = [sorted((drawn(mean, spread, limit) for _ in range(BATCH)), reverse=True) for _ in range(2000)]
    seen = [length for rows in draws for length in rows[::together]]
    expected = expect_lengths(fmean(map(fmean, draws)), spread, BATCH, limit)[::together]
    assert fmean(expected) == pytest.approx(fmean(seen), rel=0.03)
    assert fmean(each**2 for each in expected) == pytest.approx(fmean(each**2 for each in seen), rel=0.08)


@settings(deadline=None)
@given(st.floats(1, 4096), st.floats(0, 1.5), st.integers(1, 512), st.integers(16, 4096))
def test_a_sorted_batch_has_its_rows_mean_and_stays_below_the_limit(
    mean: float, spread: float, count: int, limit: int
) -> None:
    """Sorted lengths decrease, and keep their mean."""
    lengths = expect_lengths(mean, spread, count, limit)
    assert list(lengths) == sorted(lengths, reverse=True)
    assert fmean(lengths) == pytest.approx(min(mean, limit), rel=1e-6)
    assert 0 <= lengths[-1] <= lengths[0] <= limit


@given(st.floats(1, 2048), st.floats(0, 1.5), st.integers(1, 64), st.integers(16, 4096))
def test_padding_by_chance_lies_between_the_mean_and_the_limit(
    mean: float, spread: float, count: int, limit: int
) -> None:
    """The longest of a batch is no shorter than the mean and no longer than truncation allows."""
    length = expect_longest(min(mean, limit), spread, count, limit)
    assert min(mean, limit) <= length + 1
    assert 1 <= length <= limit


def test_order_saves_padding_most_where_a_step_has_many_parts() -> None:
    """A batch in one piece is as long as its longest row; in single rows of chats nothing is padded."""
    recipe = Recipe.model_validate(
        {
            "name": "test", "method": "sft", "model_name_or_path": "m", "global_batch_size": BATCH,
            "dataset_mixture": {"datasets": [{"id": "test"}]}, "trainer_args": {"max_length": 2048},
        }
    )  # fmt: skip
    chats = Workload(rows=1000, tokens=500, source="test")

    def length(micro: int, processes: int, *, in_order: bool) -> float:
        engine = "ddp" if processes > 1 else "single"
        layout = Layout.model_validate(
            {"processes": processes, "micro_batch": micro, "engine": engine, "attention": "sdpa",
             "activation_checkpointing": False, "reference": "none"}
        )  # fmt: skip
        return make_micro_batch(recipe, layout, chats, in_order=in_order).length

    assert length(1, 1, in_order=True) == pytest.approx(500)
    sizes = [length(micro, 8, in_order=True) for micro in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes)
    assert length(4, 1, in_order=True) < 1.05 * 500 < length(4, 1, in_order=False)
    assert sizes[-1] > length(16, 8, in_order=False)


def test_the_longer_half_of_a_pair_is_what_both_are_padded_to() -> None:
    """The longer half exceeds the mean if lengths differ, and never exceeds the limit."""
    assert expect_longer_half(500, 0.56, 1024) > 500
    assert expect_longer_half(500, 0.0, 1024) == 500
    assert expect_longer_half(1000, 0.56, 1024) == 1024

"""Rows and tokens: of data sets that are known, and of files that are counted."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.estimate import counted_workload, known_workload
from trainer.estimate.workload import KNOWN, truncate_mean
from trainer.recipe import Recipe, load, names
from trainer.worker.synthetic import DATA

FEEDBACK = {"id": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}
TESTS = [{"id": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs"}]


def recipe(method: str = "dpo", mixture: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test", "method": method, "model_name_or_path": "m", "global_batch_size": 8,
            "dataset_mixture": mixture or {"datasets": [FEEDBACK]}, **keys,
        }
    )  # fmt: skip


def test_a_known_data_set_has_its_rows_and_tokens() -> None:
    """UltraFeedback, both sequences of a pair together, within what `max_length` allows."""
    found = known_workload(recipe(mixture={"datasets": [FEEDBACK], "test_datasets": TESTS}))
    assert found is not None
    assert (found.rows, found.test_rows) == (61_135, 2_000)
    assert 900 < found.tokens < 2 * 478
    assert "huggingface.co/datasets" in found.source


def test_one_unknown_data_set_makes_all_unknown() -> None:
    """A mixture is as known as its least known part; so is a split that is not there."""
    assert known_workload(recipe(mixture={"datasets": [FEEDBACK, {"id": "mine.jsonl"}]})) is None
    assert known_workload(recipe(mixture={"datasets": [{**FEEDBACK, "split": "nope"}]})) is None


def test_parts_and_limits_are_counted() -> None:
    """`weight`, `max_train_samples`, `max_test_samples` and `test_split_size` change the rows."""
    half = known_workload(recipe(mixture={"datasets": [{**FEEDBACK, "weight": 0.5}]}))
    assert half is not None
    assert half.rows == 30_567
    mixture = {"datasets": [FEEDBACK], "test_split_size": 0.1}
    split = known_workload(recipe(mixture=mixture, max_train_samples=1000, max_test_samples=50))
    assert split is not None
    assert (split.rows, split.test_rows) == (1000, 50)


def test_a_mixture_s_mean_is_by_rows() -> None:
    """Two data sets of unlike length meet at their rows' weighted mean."""
    chats = {"id": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}
    short = {"id": "generated:chats", "split": "train"}
    keys = {"trainer_args": {"max_length": 2048, "packing": True}}
    both = known_workload(recipe("sft", {"datasets": [chats, short]}, **keys))
    assert both is not None
    assert both.tokens == pytest.approx((207_865 * 1374 + 520 * 25) / (207_865 + 520))


def test_the_generated_data_are_as_large_as_they_are_said_to_be() -> None:
    """The table's rows and tokens of the generated data match the generator."""
    for name, make in DATA.items():
        assert {split: len(make(split)) for split in ("train", "test")} == KNOWN[name].rows


def test_shipped_recipes_that_name_a_known_data_set_are_known() -> None:
    """No shipped recipe needs its data counted before its hours are known."""
    assert all(known_workload(load(name).recipe) for name in names())


def test_a_file_s_tokens_are_a_guess_and_it_says_so() -> None:
    """Tokens are guessed at four bytes each, with half of a pair's bytes for each sequence."""
    found = counted_workload(recipe(), rows=100, size_bytes=100 * 1600)
    assert found.tokens == pytest.approx(400, rel=0.02)
    assert "guessed at" in found.source
    assert counted_workload(recipe("sft"), rows=100, size_bytes=160_000).tokens == pytest.approx(
        400, rel=0.02
    )


def test_truncation_lowers_the_mean_and_never_passes_the_limit() -> None:
    """Far above the lengths it changes nothing; far below, it is the length."""
    assert truncate_mean(500, 0.5, 100_000) == pytest.approx(500)
    assert truncate_mean(500, 0.5, 1024) < 500
    assert truncate_mean(5000, 0.1, 100) == pytest.approx(100)
    assert truncate_mean(500, 0.0, 1024) == 500

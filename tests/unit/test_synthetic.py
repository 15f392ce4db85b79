"""The generated instructions: learnable, the same everywhere, and a test split that asks anew."""

from __future__ import annotations

import re

import pytest

from trainer.errors import DataError
from trainer.synthetic import facts, instructions


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_the_same_at_every_call(split: str) -> None:
    """A recovered run must train on the rows that the run began with."""
    assert instructions(split) == instructions(split)


def test_no_question_is_in_both_splits() -> None:
    """A right answer to a test question was put together, not remembered."""
    train, test = ({row["prompt"] for row in instructions(split)} for split in ("train", "test"))
    assert test
    assert not train & test


def test_every_fact_of_the_test_split_is_taught() -> None:
    """What a test question asks can be known: its answer is in the train split under other questions."""
    taught = {row["messages"][-1]["content"] for row in instructions("train")}
    assert {row["messages"][-1]["content"] for row in instructions("test")} <= taught


def test_every_phrasing_is_taught() -> None:
    """A test question is in words that the train split uses, so only the combination is new."""
    asked = (" ".join(row["prompt"] for row in instructions(split)) for split in ("train", "test"))
    train, test = (set(re.findall(r"\w+", text.lower())) for text in asked)
    assert test <= train


def test_wrong_answers_are_wrong() -> None:
    """No fact counts its right answer among the wrong ones, and each has a choice of those."""
    for fact in facts():
        assert fact.right not in fact.wrong
        assert len(set(fact.wrong)) >= 2


def test_a_row_is_a_chat_and_a_pair() -> None:
    """The same rows serve SFT and DPO: the chat is the chosen answer's."""
    for row in instructions("train"):
        assert row["messages"] == row["chosen"]
        assert row["chosen"][:-1] == row["rejected"][:-1] == [{"role": "user", "content": row["prompt"]}]
        assert row["chosen"][-1] != row["rejected"][-1]


def test_another_split_is_refused() -> None:
    """A split that is not generated is named, with those that are."""
    with pytest.raises(DataError, match="no split validation"):
        instructions("validation")

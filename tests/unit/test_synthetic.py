"""The generated data: learnable, the same everywhere, and a test split that asks anew."""

from __future__ import annotations

import re

import pytest

from trainer.errors import DataError
from trainer.worker.synthetic import DATA, chats, facts, preferences


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", DATA)
def test_rows_are_the_same_at_every_call(name: str, split: str) -> None:
    """A recovered run must train on the rows that the run began with."""
    assert DATA[name](split) == DATA[name](split)


def answer(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


def test_no_question_is_in_both_splits() -> None:
    """A right answer to a test question was put together, not remembered."""
    train, test = ({row["prompt"] for row in preferences(split)} for split in ("train", "test"))
    assert test
    assert not train & test


def test_every_fact_of_the_test_split_is_taught() -> None:
    """What a test question asks can be known: its answer is preferred in the train split, to other questions."""
    taught = {answer(row["chosen"]) for row in preferences("train")}
    assert {answer(row["chosen"]) for row in preferences("test")} <= taught


def test_every_phrasing_is_taught() -> None:
    """A test question is in words that the train split uses, so only the combination is new."""
    asked = (" ".join(row["prompt"] for row in preferences(split)) for split in ("train", "test"))
    train, test = (set(re.findall(r"\w+", text.lower())) for text in asked)
    assert test <= train


def test_wrong_answers_are_wrong() -> None:
    """No fact counts its right answer among the wrong ones, and each has a choice of those."""
    for fact in facts():
        assert fact.right not in fact.wrong
        assert len(set(fact.wrong)) >= 2


def test_a_pair_is_one_question_with_two_answers() -> None:
    """Chosen and rejected differ in the answer alone."""
    for row in preferences("train"):
        assert row["chosen"][:-1] == row["rejected"][:-1] == [{"role": "user", "content": row["prompt"]}]
        assert row["chosen"][-1] != row["rejected"][-1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_chats_do_not_tell_what_is_right(split: str) -> None:
    """Each question is answered right once and wrong once, so only preferences can teach the difference."""
    right = {fact.right for fact in facts()}
    told = [answer(row["messages"]) in right for row in chats(split)]
    assert told.count(True) == told.count(False) == len(preferences(split))


def test_another_split_is_refused() -> None:
    """A split that is not generated is named, with those that are."""
    with pytest.raises(DataError, match="no split validation"):
        preferences("validation")

"""Raw UltraFeedback as pairs, by the mean of the ratings; and Argilla's pairs, which have the same columns."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.method import METHODS
from trainer.recipe import Recipe
from trainer.worker import ultrafeedback
from trainer.worker.row_formats import Malformed, Pair, check_columns, dpo_form
from trainer.worker.sources import read
from trainer.worker.ultrafeedback import ALIKE, UNRATED, Rated, binarise, pick, rate

MEANS = st.lists(st.none() | st.sampled_from([1.0, 2.5, 4.0, 4.25, 5.0]), max_size=5)


def answer(text: str, *ratings: str, overall: float = 1.0) -> dict[str, Any]:
    """A completion as UltraFeedback has it, its ratings in the order of `ASPECTS`; one alone is all four."""
    ratings = ratings if len(ratings) == 4 else ratings * 4
    annotations = {
        aspect: {"Rating": rating, "Rationale": "because"}
        for aspect, rating in zip(ultrafeedback.ASPECTS, ratings, strict=True)
    }
    return {"model": f"m-{text}", "response": text, "annotations": annotations, "overall_score": overall}


def row(question: str, *answers: dict[str, Any]) -> dict[str, Any]:
    return {"source": "test", "instruction": question, "completions": list(answers)}


def four(question: str) -> dict[str, Any]:
    """A row with one best answer and three that are worse."""
    return row(question, answer("low", "1"), answer("best", "5"), answer("mid", "3"), answer("fair", "4"))


def test_the_mean_is_of_the_four_ratings_and_of_nothing_else() -> None:
    """The overall score, 0 to 10, is what this exists to avoid."""
    assert rate(answer("x", "5", "4", "3", "2", overall=10.0)) == Rated(3.5, 0)


@pytest.mark.parametrize("rating", ["N/A", "", "very good", None, "nan", "10", "-1"])
def test_a_rating_that_is_no_number_does_not_count(rating: Any) -> None:
    """The mean is of the others, and it is counted that one was left out; so is a number off the scale."""
    assert rate(answer("x", "5", rating, "4", "3")) == Rated(4.0, 1)


@pytest.mark.parametrize("annotations", [None, {}, {"honesty": None}, {"honesty": {"Rationale": "none"}}])
def test_an_answer_without_ratings_has_no_mean(annotations: Any) -> None:
    """A missing rating is not counted as 0."""
    assert rate({"response": "x", "annotations": annotations}) == Rated(None, 4)


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([4.0, 5.0], (1, 0)),
        ([5.0, 5.0, 4.0], (0, 2)),
        ([None, 3.0, None, 2.0], (1, 3)),
        ([4.0, 4.0, 4.0, 4.0], ALIKE),
        ([4.0, None, 4.0], ALIKE),
        ([4.0, None, None], UNRATED),
        ([], UNRATED),
    ],
)
def test_the_best_is_chosen_and_a_worse_one_rejected(means: list[float | None], expected: object) -> None:
    """The first of several best answers is chosen. An equal answer is never rejected. Equal ratings give no pair."""
    assert pick(means, draw="0/q") == expected


@given(means=MEANS, draw=st.text(max_size=5))
def test_a_pair_always_prefers(means: list[float | None], draw: str) -> None:
    """Whatever the ratings, the chosen answer is the best and the rejected one is worse."""
    picked = pick(means, draw=draw)
    rated = [mean for mean in means if mean is not None]
    if isinstance(picked, str):
        assert len(set(rated)) < 2
        return
    chosen, rejected = (means[place] for place in picked)
    assert chosen is not None
    assert rejected is not None
    assert rejected < chosen == max(rated)


def test_every_worse_answer_has_its_turn() -> None:
    """The rejected one is random, not the worst: so do Zephyr and Notus."""
    pairs = binarise([four(f"question {number}") for number in range(60)], name="t", seed=42)
    assert {pair["chosen_response"] for pair in pairs} == {"best"}
    counts = [sum(pair["rejected_response"] == name for pair in pairs) for name in ("low", "mid", "fair")]
    assert all(count >= 10 for count in counts)


def test_a_draw_depends_on_the_seed_and_the_question_alone() -> None:
    """Other rows, or another order of the files, change no pair; another seed does."""
    rows = [four(f"question {number}") for number in range(20)]
    pairs = list(binarise(rows, name="t", seed=42))
    assert list(binarise(rows[::-1][:7], name="t", seed=42)) == pairs[::-1][:7]
    assert list(binarise(rows, name="t", seed=1)) != pairs


def test_pairs_have_the_columns_of_argillas(caplog: pytest.LogCaptureFixture) -> None:
    """One row in full, and what is said of the others."""
    rows = [
        row("q", answer("good", "5", "N/A", "4", "3"), answer("bad", "2")),
        row("alike", answer("one", "3"), answer("two", "3")),
        row("unrated", answer("one", "N/A"), answer("two", "3")),
    ]
    with caplog.at_level(logging.INFO, logger="trainer"):
        pairs = binarise(rows, name="raw (train)", seed=42)
    assert list(pairs) == [
        {
            "instruction": "q",
            "chosen_response": "good",
            "rejected_response": "bad",
            "chosen_avg_rating": 4.0,
            "rejected_avg_rating": 2.0,
            "chosen_model": "m-good",
        }
    ]
    assert (len(pairs), pairs[0], list(pairs[:1])) == (1, next(iter(pairs)), list(pairs))
    told = (
        "raw (train): built 1 pairs from 3 rows, by the mean rating of each answer; rows without a pair: "
        "1 x all answers rated alike, 1 x fewer than two rated answers; "
        "ignored 5 ratings that are not numbers from 0 to 5"
    )
    assert caplog.messages == [told]


def test_rows_on_disk_give_the_same_pairs(tmp_path: Path) -> None:
    """Arrow, which the Hub's data come as, or JSON: the same."""
    from datasets import Dataset

    rows = [four(f"question {number}") for number in range(5)]
    assert list(binarise(Dataset.from_list(rows), name="t", seed=0)) == list(binarise(rows, name="t", seed=0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": "a", "rejected": "b"}], "has no column instruction, which `binarise` needs"),
        (
            [row("q", answer("one", "3"), answer("two", "3"))],
            "none of 1 rows has a pair: 1 x all answers",
        ),
    ],
)
def test_data_that_make_no_pairs_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    """Data of another form, or without a preference in them."""
    with pytest.raises(DataError, match=message):
        binarise(rows, name="t", seed=0)


def recipe(path: Path, **source: Any) -> Recipe:
    return Recipe(
        name="test", method="dpo", init="tiny", global_batch_size=1,
        dataset_mixture={"datasets": [{"id": str(path), **source}], "test_split_size": 3, "seed": 42},
    )  # fmt: skip


def test_rows_are_held_out_by_the_seed(tmp_path: Path) -> None:
    """A recipe's pairs: none is lost, none is on both sides, and every machine holds out the same."""
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(four(f"question {number}")) + "\n" for number in range(10)))
    first, again = (read(recipe(path, binarise="mean_rating")) for _ in range(2))
    train, test = ([pair["instruction"] for pair in rows] for rows in first)
    assert (len(train), len(test)) == (7, 3)
    assert sorted(train + test) == sorted(f"question {number}" for number in range(10))
    assert [list(rows) for rows in first] == [list(rows) for rows in again]


def test_a_question_and_two_responses_are_a_chat() -> None:
    """Argilla's columns, and our own: not plain text, though they are strings."""
    pair = {"instruction": "q", "chosen_response": "yes", "rejected_response": "no", "source": "x"}
    check_columns(pair, METHODS["dpo"])
    assert dpo_form(pair) == Pair(
        [{"role": "user", "content": "q"}],
        [{"role": "assistant", "content": "yes"}],
        [{"role": "assistant", "content": "no"}],
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction": None}, "instruction is empty"),
        ({"rejected_response": " "}, "rejected_response is empty"),
        ({"chosen_response": "no"}, "are the same"),
    ],
)
def test_malformed_responses(change: dict[str, Any], reason: str) -> None:
    """An answer that says nothing, or both the same, cannot be learned from."""
    with pytest.raises(Malformed, match=reason):
        dpo_form({"instruction": "q", "chosen_response": "yes", "rejected_response": "no", **change})

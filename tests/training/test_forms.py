"""Which rows can be trained on, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.errors import DataError
from trainer.method import METHODS
from trainer.worker.row_formats import (
    Chat,
    Completion,
    Malformed,
    Pair,
    check_columns,
    dpo_form,
    sft_form,
)

ASK = {"role": "user", "content": "q"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
RULE = {"role": "system", "content": ""}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [RULE, ASK, YES]}, Chat([RULE, ASK, YES])),
        ({"prompt": "q", "completion": "yes"}, Completion("q", "yes")),
        ({"prompt": [ASK], "completion": [YES]}, Completion([ASK], [YES])),
        ({"prompt": "q", "completion": [YES]}, Completion([ASK], [YES])),
    ],
)
def test_sft_forms(row: dict[str, Any], form: Any) -> None:
    """Chats, and prompts with completions, as text or as messages."""
    check_columns(row, METHODS["sft"])
    assert sft_form(row) == form


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, Pair([ASK], [YES], [NO])),
        (
            {"prompt": "other", "chosen": [RULE, ASK, YES], "rejected": [RULE, ASK, NO]},
            Pair([RULE, ASK], [YES], [NO]),
        ),
        ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, Pair([ASK], [YES], [NO])),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, Pair([ASK], [YES], [NO])),
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, Pair("q", "yes", "no")),
    ],
)
def test_dpo_forms(row: dict[str, Any], form: Any) -> None:
    """Whole chats with or without `prompt`, answers as messages, and plain text."""
    check_columns(row, METHODS["dpo"])
    assert dpo_form(row) == form


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASK]}, "no assistant turn"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "tool", "content": "x"}, YES]}, "role is 'tool'"),
        ({"messages": [{"role": "user", "content": " "}, YES]}, "no content"),
        ({"messages": [{"role": "user", "content": None}, YES]}, "no content"),
        ({"prompt": "q", "completion": ""}, "completion is empty"),
        ({"prompt": [ASK], "completion": [ASK]}, "does not end with an assistant turn"),
    ],
)
def test_malformed_chats(row: dict[str, Any], reason: str) -> None:
    """Each fault has a reason that rows with the same fault share."""
    with pytest.raises(Malformed, match=reason):
        sft_form(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "are the same"),
        ({"chosen": [ASK, YES], "rejected": [{**ASK, "content": "r"}, NO]}, "different prompts"),
        ({"chosen": [ASK], "rejected": [ASK]}, "chosen does not end"),
        ({"prompt": None, "chosen": [YES], "rejected": [NO]}, "prompt is empty"),
        ({"prompt": "q", "chosen": "yes", "rejected": None}, "rejected is empty"),
    ],
)
def test_malformed_pairs(row: dict[str, Any], reason: str) -> None:
    """A pair that could not be told apart, or answers two questions, is none."""
    with pytest.raises(Malformed, match=reason):
        dpo_form(row)


def test_chats_are_no_pairs() -> None:
    """DPO on chats names the columns it found and those it needs."""
    with pytest.raises(DataError, match=r"dpo needs `chosen` and `rejected`.*have id, messages"):
        check_columns({"messages": [ASK, YES], "id": 1}, METHODS["dpo"])


def test_pairs_are_no_chats_unless_the_recipe_says_so() -> None:
    """SFT on preference data is refused, with the line that would allow it."""
    with pytest.raises(DataError, match="sft needs `messages`") as error:
        check_columns({"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]}, METHODS["sft"])
    assert "columns: {chosen: messages}" in str(error.value)

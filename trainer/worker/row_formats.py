"""Parses rows into the forms that training knows, and names what is wrong with other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.errors import DataError
from trainer.method import TrainingMethod
from trainer.worker.chat_template import Message
from trainer.worker.sources import Row

ROLES = ("system", "user", "assistant")

RESPONSES = ("instruction", "chosen_response", "rejected_response")
"""A question and two answers, as in https://huggingface.co/datasets/argilla/ultrafeedback-binarized-preferences."""


class Malformed(ValueError):
    """A row that cannot be trained on. The message is the reason; similar rows have the same message."""


class Chat(NamedTuple):
    """A chat of several turns."""

    messages: list[Message]


class Completion(NamedTuple):
    """A prompt and its completion: both are text, or both are messages."""

    prompt: Any
    completion: Any


class Pair(NamedTuple):
    """A prompt and two answers: all three are text, or all three are messages."""

    prompt: Any
    chosen: Any
    rejected: Any


def check_columns(row: Row, method: TrainingMethod) -> None:
    """Raise `DataError` if the data have no form that the method can train on."""
    if any(all(column in row for column in form.columns) for form in method.row_forms):
        return
    hint = None
    if "chosen" in row and "rejected" in row and any("messages" in form.columns for form in method.row_forms):
        hint = (
            "to train on the chosen answers of preference data, give the source `columns: {chosen: messages}`"
        )
    raise DataError(
        f"{method.name} needs {method.needed_columns}; the data have {', '.join(sorted(row))}", hint=hint
    )


def sft_form(row: Row) -> Chat | Completion:
    """Parse a row for SFT; raise `Malformed` if it cannot be used."""
    if row.get("messages") is not None:
        messages = _messages(row["messages"])
        if not any(message["role"] == "assistant" for message in messages):
            raise Malformed("no assistant turn")
        return Chat(messages)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(completion, str):
        return Completion(_text(prompt, "prompt"), _text(completion, "completion"))
    return Completion(_prompt_messages(prompt), _answer(completion, "completion"))


def dpo_form(row: Row) -> Pair:
    """Parse a row for DPO; raise `Malformed` if it cannot be used."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if "chosen" not in row and "chosen_response" in row:
        pair = Pair(*(_turn(row, name) for name in RESPONSES))
    elif isinstance(chosen, str) or isinstance(rejected, str):
        pair = Pair(_text(prompt, "prompt"), _text(chosen, "chosen"), _text(rejected, "rejected"))
    else:
        pair = _message_pair(prompt, _answer(chosen, "chosen"), _answer(rejected, "rejected"))
    if pair.chosen == pair.rejected:
        raise Malformed("chosen and rejected are the same")
    return pair


def _turn(row: Row, name: str) -> list[Message]:
    role = "user" if name == "instruction" else "assistant"
    return [{"role": role, "content": _text(row.get(name), name)}]


def _message_pair(prompt: Any, chosen: list[Message], rejected: list[Message]) -> Pair:
    """Split two whole chats into prompt and answers.

    A prompt inside the chats replaces the column `prompt`, which in UltraFeedback holds only the last question.
    """
    if chosen[:-1] != rejected[:-1]:
        raise Malformed("chosen and rejected answer different prompts")
    before = chosen[:-1] or _prompt_messages(prompt)
    return Pair(before, chosen[-1:], rejected[-1:])


def _answer(value: Any, name: str) -> list[Message]:
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise Malformed(f"{name} does not end with an assistant turn")
    return messages


def _prompt_messages(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, "prompt")}]
    return _messages(value, "prompt")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Malformed(f"{name} is empty or not text")
    return value


def _messages(value: Any, name: str = "messages") -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise Malformed(f"{name} is empty or not a list of messages")
    return [_message(message) for message in value]


def _message(message: Any) -> Message:
    role, content = (
        (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    )
    if role not in ROLES:
        raise Malformed(f"a message's role is {role!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not (content.strip() or role == "system"):
        raise Malformed("a message has no content")
    return {"role": role, "content": content}

"""Generated chats and preferences that a model with a million weights can learn in a minute.

There are a few dozen facts, and several phrasings of a question about each. The test split asks about the same facts in
phrasings that the training split uses only for other facts. So a right answer there is generalised, not remembered.
Half of the answers in the chats are wrong, so chats teach only the form of an answer. The preferences teach which answer
is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trainer.errors import DataError

Row = dict[str, Any]
SEED = 2024
HOLD_OUT = 6  # one in this many phrasings of a fact is used only in the test split

KINDS = {
    "animal": ("sparrow", "horse", "salmon", "spider", "tiger", "camel"),
    "plant": ("tulip", "cactus", "fern", "willow", "thistle", "bamboo"),
    "tool": ("hammer", "shovel", "wrench", "chisel", "ladder", "drill"),
    "vehicle": ("truck", "canoe", "tractor", "bicycle", "rocket", "scooter"),
}
COLOURS = {
    "red": ("tomato", "ruby", "cherry"),
    "yellow": ("lemon", "banana", "canary"),
    "green": ("cucumber", "lime", "pea"),
    "white": ("pearl", "swan", "tooth"),
}
LARGEST_ADDEND = 4
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

KIND_QUESTIONS = (
    "What kind of thing is a {0}?",
    "Tell me what a {0} is.",
    "Is a {0} an animal, a plant, a tool or a vehicle?",
    "I saw a {0} today. What is that?",
    "Which group does a {0} belong to?",
    "Please classify this word: {0}",
)
COLOUR_QUESTIONS = (
    "What colour is a {0}?",
    "Tell me the colour of a {0}.",
    "I want to paint a {0}. Which colour do I need?",
    "Which colour does a {0} have?",
    "If you look at a {0}, what colour do you see?",
    "Name the colour: {0}",
)
SUM_QUESTIONS = (
    "What is {0} plus {1}?",
    "Add {0} and {1}.",
    "I have {0} coins and get {1} more. How many are there?",
    "Please work out {0} plus {1}.",
    "How much is {0} and {1}?",
    "Sum: {0} and {1}",
)


class Fact(NamedTuple):
    """A subject with questions, the right answer and wrong answers."""

    questions: tuple[str, ...]
    subject: tuple[str, ...]
    right: str
    wrong: tuple[str, ...]


def chats(split: str) -> list[Row]:
    """Return rows with `messages`: each question twice, once with the right and once with a wrong answer.

    Raises:
        DataError: `split` is neither `train` nor `test`.
    """
    choice = random.Random(f"{SEED}/{split}/chats")
    rows: list[Row] = [
        {"messages": _chat(question, answer)}
        for question, right, wrong in _questions(split, choice)
        for answer in (right, wrong)
    ]
    choice.shuffle(rows)
    return rows


def preferences(split: str) -> list[Row]:
    """Return rows with `prompt`, `chosen` and `rejected`: each question once, with the right and a wrong answer.

    Raises:
        DataError: `split` is neither `train` nor `test`.
    """
    choice = random.Random(f"{SEED}/{split}")
    rows: list[Row] = [
        {"prompt": question, "chosen": _chat(question, right), "rejected": _chat(question, wrong)}
        for question, right, wrong in _questions(split, choice)
    ]
    choice.shuffle(rows)
    return rows


DATA: dict[str, Callable[[str], list[Row]]] = {"generated:chats": chats, "generated:preferences": preferences}
"""The generators, by the id in a recipe's `dataset_mixture`."""


def _questions(split: str, choice: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield every question of a split, with the right answer and one of the wrong answers."""
    if split not in ("train", "test"):
        raise DataError(f"the generated data have no split {split}", hint="use `train` or `test`")
    for number, fact in enumerate(facts()):
        for phrasing, question in enumerate(fact.questions):
            if ((number + phrasing) % HOLD_OUT == 0) == (split == "test"):
                yield question.format(*fact.subject), fact.right, choice.choice(fact.wrong)


def facts() -> Iterator[Fact]:
    """Yield all facts."""
    for kind, nouns in KINDS.items():
        for noun in nouns:
            wrong = tuple(f"A {noun} is {_a(other)}." for other in KINDS if other != kind)
            yield Fact(KIND_QUESTIONS, (noun,), f"A {noun} is {_a(kind)}.", wrong)
    for colour, things in COLOURS.items():
        for thing in things:
            wrong = tuple(f"A {thing} is {other}." for other in COLOURS if other != colour)
            yield Fact(COLOUR_QUESTIONS, (thing,), f"A {thing} is {colour}.", wrong)
    for first in range(1, LARGEST_ADDEND + 1):
        for second in range(1, LARGEST_ADDEND + 1):
            yield _sum(first, second)


def _sum(first: int, second: int) -> Fact:
    subject = (NUMBERS[first], NUMBERS[second])
    answer = f"{subject[0]} and {subject[1]} is {{}}.".capitalize()
    total = first + second
    wrong = tuple(answer.format(NUMBERS[other]) for other in (total - 2, total - 1, total + 1) if other > 0)
    return Fact(SUM_QUESTIONS, subject, answer.format(NUMBERS[total]), wrong)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

"""Chats to token ids: the template's words, what is learned of them, where they are cut."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.errors import DataError
from trainer.recipe import Recipe
from trainer.worker import chat_template, data
from trainer.worker.chat_template import ZEPHYR_TEMPLATE, Renderer
from trainer.worker.model_source import _train_tokenizer
from trainer.worker.row_formats import Malformed
from trainer.worker.synthetic import chats, preferences

ASK = {"role": "user", "content": "What is a hammer?"}
TELL = {"role": "assistant", "content": "A hammer is a tool."}
AGAIN = {"role": "user", "content": "Is it?"}
CONFIRM = {"role": "assistant", "content": "It is."}
WRONG = {"role": "assistant", "content": "A plant."}
GEMMA_LIKE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = (message["content"] for row in chats("train") for message in row["messages"])
    tokenizer = _train_tokenizer(texts, 500)
    tokenizer.chat_template = ZEPHYR_TEMPLATE
    return tokenizer


def recipe(method: str = "sft", **settings: Any) -> Recipe:
    ours = {key: settings.pop(key) for key in list(settings) if key in Recipe.model_fields}
    mixture = {"datasets": [{"id": "generated:chats"}]}
    return Recipe(
        name="t",
        method=method,
        init="tiny",
        global_batch_size=1,
        dataset_mixture=mixture,
        trainer_args=settings,
        **ours,
    )


def learned(tokenizer: Any, row: dict[str, list[int]]) -> str:
    """The text of the tokens that have labels; a gap is shown as an ellipsis."""
    text, ids = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == data.IGNORED:
            text.append(tokenizer.decode(ids)) if ids else None
            ids = []
        else:
            assert label == token
            ids.append(token)
    return "…".join([*text, tokenizer.decode(ids)] if ids else text)


def test_a_chat_is_written_as_zephyr_writes_it(tokenizer: Any) -> None:
    """The text is that of zephyr-7b-beta's template, with the handbook's empty system message."""
    text = Renderer(tokenizer, insert_system=True).chat([ASK, TELL], assistant_only=False)
    assert text.text == (
        "<|system|>\n</s>\n<|user|>\nWhat is a hammer?</s>\n<|assistant|>\nA hammer is a tool.</s>\n"
    )


def test_a_template_without_system_messages_gets_none(tokenizer: Any) -> None:
    """Templates that refuse a system message are not given an empty one."""
    template, tokenizer.chat_template = tokenizer.chat_template, GEMMA_LIKE
    try:
        text = Renderer(tokenizer, insert_system=True).chat([ASK, TELL], assistant_only=False).text
    finally:
        tokenizer.chat_template = template
    assert text == "[user]What is a hammer?[assistant]A hammer is a tool."


def test_a_whole_chat_is_learned(tokenizer: Any) -> None:
    """Plain SFT learns every token, as the handbook does."""
    row = data.for_sft([{"messages": [ASK, TELL]}], tokenizer, recipe(), "training").dataset[0]
    assert row["labels"] == row["input_ids"]


def test_only_the_assistant_is_learned(tokenizer: Any) -> None:
    """With assistant_only_loss every assistant turn has labels, its end of sequence included, and nothing else."""
    rows = [{"messages": [ASK, TELL, AGAIN, CONFIRM]}]
    row = data.for_sft(rows, tokenizer, recipe(assistant_only_loss=True), "training").dataset[0]
    assert learned(tokenizer, row) == "A hammer is a tool.</s>…It is.</s>"


def test_real_ends_are_learned_though_padding_is_the_same_token(tokenizer: Any) -> None:
    """Padding is masked by length, so the end-of-sequence token keeps its label in a padded batch."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"messages": [ASK, TELL, AGAIN, CONFIRM]}, {"messages": [ASK, TELL]}]
    dataset = data.for_sft(rows, tokenizer, recipe(), "training").dataset
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(list(dataset))
    length = len(dataset[1]["input_ids"])
    assert (batch["labels"][1][length:] == data.IGNORED).all()
    assert (batch["labels"][1][:length] == tokenizer.eos_token_id).sum() == 3


@pytest.mark.parametrize(
    ("completion_only", "expected"), [(None, " tool.</s>"), (False, "A hammer is a tool.</s>")]
)
def test_plain_text_learns_the_completion(
    tokenizer: Any, completion_only: bool | None, expected: str
) -> None:
    """A prompt is masked unless the recipe says otherwise, and the end of sequence is added."""
    rows = [{"prompt": "A hammer is a", "completion": " tool."}]
    settings = recipe(completion_only_loss=completion_only)
    assert learned(tokenizer, data.for_sft(rows, tokenizer, settings, "training").dataset[0]) == expected


def test_sft_rows_are_cut(tokenizer: Any) -> None:
    """`max_length` keeps the beginning, and a row with nothing left to learn is not used."""
    rows = [{"messages": [ASK, TELL]}, {"messages": [{**ASK, "content": "What is it? " * 20}, TELL]}]
    cut = data.for_sft(rows, tokenizer, recipe(assistant_only_loss=True, max_length=40), "training").dataset
    assert len(cut) == 1
    whole = data.for_sft(rows[:1], tokenizer, recipe(assistant_only_loss=True), "training").dataset[0]
    assert cut[0]["labels"] == whole["labels"][:40]


def test_a_pair_is_a_prompt_and_two_ends(tokenizer: Any) -> None:
    """The prompt ends where the assistant is to speak; both answers end with the end of sequence."""
    rows = [{"prompt": "q", "chosen": [ASK, TELL], "rejected": [ASK, WRONG]}]
    row = data.for_dpo(rows, tokenizer, recipe("dpo"), "training").dataset[0]
    assert tokenizer.decode(row["prompt_ids"]).endswith("What is a hammer?</s>\n<|assistant|>\n")
    assert tokenizer.decode(row["chosen_ids"]) == "A hammer is a tool.</s>"
    assert tokenizer.decode(row["rejected_ids"]) == "A plant.</s>"


def test_our_pairs_are_those_of_trl(tokenizer: Any) -> None:
    """Where TRL has no fault, ours are its ids, but for the newline that it trains after the end of sequence."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in preferences("train")[:20]]
    ours = data.for_dpo(
        rows, tokenizer, recipe("dpo", auto_insert_empty_system_msg=False), "training"
    ).dataset
    trainer = DPOTrainer.__new__(DPOTrainer)
    theirs = trainer._prepare_dataset(
        Dataset.from_list(rows), tokenizer, DPOConfig(bf16=False, use_cpu=True), "t"
    )
    newline = tokenizer("\n")["input_ids"]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["prompt_ids"] == other["prompt_ids"]
        assert mine["chosen_ids"] + newline == other["chosen_ids"]
        assert mine["rejected_ids"] + newline == other["rejected_ids"]


CUT = {"prompt_length": 4, "max_prompt_length": None, "keep_prompt_end": True, "max_length": None}


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, ([1, 2, 3, 4], [5, 6, 7], [8, 9])),
        ({"max_prompt_length": 2}, ([3, 4], [5, 6, 7], [8, 9])),
        ({"max_prompt_length": 2, "keep_prompt_end": False}, ([1, 2], [5, 6, 7], [8, 9])),
        ({"max_length": 6}, ([1, 2, 3, 4], [5, 6], [8, 9])),
        ({"max_prompt_length": 2, "max_length": 3}, ([3, 4], [5], [8])),
    ],
)
def test_pairs_are_cut(cut: dict[str, Any], expected: tuple[list[int], ...]) -> None:
    """First the prompt to its own length, on its side, then the whole at the end of the answers."""
    row = data.dpo_row([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9], **{**CUT, **cut})
    assert tuple(ids.tolist() for ids in row.values()) == expected


def test_a_prompt_that_tokens_reach_across_ends_before_them() -> None:
    """Where the two answers' tokens differ already within the prompt, the prompt ends there for both."""
    row = data.dpo_row([1, 2, 3, 4, 5], [1, 2, 9, 6], **CUT)
    assert [ids.tolist() for ids in row.values()] == [[1, 2], [3, 4, 5], [9, 6]]


@pytest.mark.parametrize(
    ("rejected", "cut", "reason"),
    [([1, 2, 3, 4, 8], {"max_length": 4}, "fills max_length"), ([1, 2, 3, 4], {}, "no tokens of its own")],
)
def test_a_pair_whose_answer_would_vanish_is_dropped(
    rejected: list[int], cut: dict[str, Any], reason: str
) -> None:
    """TRL would drop the first without a word and train the second on nothing."""
    with pytest.raises(Malformed, match=reason):
        data.dpo_row([1, 2, 3, 4, 5], rejected, **{**CUT, **cut})


class Told(logging.Handler):
    """Keeps what the data module says, whatever a worker of another test did to the loggers above it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    data.log.addHandler(told)
    yield told
    data.log.removeHandler(told)


def test_unused_rows_are_counted_and_told_once(tokenizer: Any, told: Told) -> None:
    """One line says how many rows are not used, and why."""
    rows = [{"messages": [ASK, TELL]}, {"messages": [ASK]}, {"messages": [ASK]}, {"messages": []}]
    tokens = data.for_sft(rows, tokenizer, recipe(), "training")
    assert len(tokens.dataset) == 1
    assert told.messages == [
        "training data: 3 of 4 rows are not used: 2 x no assistant turn, 1 x messages is empty or not a list of messages"
    ]


def test_no_usable_row_is_an_error(tokenizer: Any) -> None:
    """Training on nothing is refused, with the first reason."""
    with pytest.raises(DataError, match="0 of 2 training rows usable; the first reason: no assistant turn"):
        data.for_sft([{"messages": [ASK]}, {"messages": [ASK]}], tokenizer, recipe(), "training")


def test_the_fingerprint_is_of_ids_in_order(tokenizer: Any) -> None:
    """The same rows give the same fingerprint; another order, one row less or other labels give another."""
    rows = chats("train")[:5]

    def fingerprint(rows: list[dict[str, Any]], **settings: Any) -> str:
        return data.for_sft(rows, tokenizer, recipe(**settings), "training").fingerprint

    assert fingerprint(rows) == fingerprint(list(rows))
    others = [fingerprint(rows[::-1]), fingerprint(rows[:4]), fingerprint(rows, assistant_only_loss=True)]
    assert len({fingerprint(rows), *others}) == 4


def test_a_template_that_refuses_a_chat_is_the_recipes_fault(tokenizer: Any) -> None:
    """A template's own exception is told with the roles it refused."""
    template, tokenizer.chat_template = tokenizer.chat_template, GEMMA_LIKE
    try:
        renderer = chat_template.Renderer(tokenizer, insert_system=False)
        with pytest.raises(chat_template.RecipeError, match="rejects a chat of system, user"):
            renderer.chat([{"role": "system", "content": "x"}, ASK], assistant_only=False)
    finally:
        tokenizer.chat_template = template


def test_a_long_start_says_how_far_it_is(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of thousands of rows take minutes, which would look like a machine that hangs."""
    monkeypatch.setattr(data, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(data, "PROGRESS_EVERY_S", 0.0)
    rows = [{"messages": [ASK, TELL]}] * 5
    with caplog.at_level(logging.INFO, logger="trainer"):
        data.for_sft(rows, tokenizer, recipe(), "training")
    told = [message for message in caplog.messages if "tokenized" in message]
    assert told == [f"training data: {done} of 5 rows are tokenized" for done in (0, 2, 4)]

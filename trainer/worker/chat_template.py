"""Chats as text: which template, what the model is to learn of it, where the prompt ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from trainer.errors import ModelError, RecipeError
from trainer.recipe import Recipe
from trainer.worker.failures import explained

log = logging.getLogger(__name__)

Message = dict[str, str]
"""`role` and `content`."""
Tokenizer = Any

ZEPHYR_TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
"""For a tokenizer that has none; from HuggingFaceH4/zephyr-7b-beta's tokenizer_config.json."""


@dataclass(frozen=True)
class Text:
    """One text for the tokenizer, and which of its characters the model is to learn."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """Character ranges, in order."""
    add_special_tokens: bool = False
    """Plain text gets the tokenizer's own; a template has written its own already."""


def load_tokenizer(path: str, recipe: Recipe) -> Tokenizer:
    """The model's tokenizer with the recipe's template, and a token to pad with.

    Raises:
        ModelError: there is none, or it cannot say which characters a token stands for.
    """
    from transformers import AutoTokenizer

    from trainer.worker.model_source import hub_arguments

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_arguments(recipe))
    except (OSError, ValueError, ImportError) as error:
        raise explained(path, error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{path} has a tokenizer without offsets", hint="save it as a fast one (tokenizer.json)"
        )
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {path} has no end-of-sequence token")
    tokenizer.chat_template = recipe.chat_template or tokenizer.chat_template or ZEPHYR_TEMPLATE
    # Real ends of sequence stay in the loss all the same: labels are masked by length, not by token.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


class Renderer:
    """Writes chats with one tokenizer's template."""

    def __init__(self, tokenizer: Tokenizer, *, insert_system: bool) -> None:
        self._tokenizer = tokenizer
        self._insert_system = insert_system and self._knows_system()

    def chat(self, messages: Sequence[Message], *, assistant_only: bool) -> Text:
        """A whole chat, to be learned in full or only where the assistant speaks."""
        messages = self._with_system(messages)
        text = self._render(messages)
        if not assistant_only:
            return Text(text, ((0, len(text)),))
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return Text(text, tuple(self._turn(messages, number, text) for number in turns))

    def completion(self, prompt: Sequence[Message], completion: Sequence[Message]) -> Text:
        """A chat of which only what follows the prompt is learned; it ends at the end-of-sequence token."""
        messages = self._with_system([*prompt, *completion])
        prompt_turns = len(messages) - len(completion)
        text = self._render(messages)
        if text.rstrip().endswith(self._tokenizer.eos_token):
            text = text.rstrip()  # Zephyr's template ends in a newline that would come after the end
        return Text(text, ((self._prompt_end(messages[:prompt_turns], text), len(text)),))

    def plain(self, prompt: str, completion: str) -> Text:
        """Text as it stands, with no template; the end-of-sequence token is added."""
        eos = self._tokenizer.eos_token
        text = prompt + completion + ("" if completion.endswith(eos) else eos)
        return Text(text, ((len(prompt), len(text)),), add_special_tokens=True)

    def _turn(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        start = self._prompt_end(messages[:number], text)
        end = _common_length(self._render(messages[: number + 1]), text)
        return start, start + len(text[start:end].rstrip())

    def _prompt_end(self, prompt: Sequence[Message], text: str) -> int:
        return _common_length(self._render(prompt, add_generation_prompt=True), text)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """As the alignment handbook does: a chat without a system message gets an empty one."""
        if self._insert_system and messages[0]["role"] != "system":
            return [{"role": "system", "content": ""}, *messages]
        return list(messages)

    def _knows_system(self) -> bool:
        """Whether the template shows a system message; some ignore it, some refuse it."""
        probe = [{"role": "system", "content": "PROBE"}, {"role": "user", "content": "x"}]
        try:
            return "PROBE" in self._tokenizer.apply_chat_template(probe, tokenize=False)
        except TemplateError:
            return False

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RecipeError(
                f"the chat template refuses a chat of {', '.join(message['role'] for message in messages)}: {error}",
                hint="choose another with `chat_template`, or take such rows out of the data",
            ) from error
        return text


def _common_length(first: str, second: str) -> int:
    if second.startswith(first):  # the rule, and fast
        return len(first)
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )

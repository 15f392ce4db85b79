"""Renders chats as text with a chat template, and marks the characters that the model learns."""

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
"""Used for a tokenizer without a template; from tokenizer_config.json of HuggingFaceH4/zephyr-7b-beta."""


@dataclass(frozen=True)
class Text:
    """A text for the tokenizer, and the characters of it that the model learns."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """Character ranges that the model learns, in order."""
    add_special_tokens: bool = False
    """True for plain text. A chat template writes its own special tokens."""


def load_tokenizer(path: str, recipe: Recipe) -> Tokenizer:
    """Load the model's tokenizer, and set the recipe's template and a padding token.

    Raises:
        ModelError: there is no tokenizer, or it cannot map tokens to characters.
        Unavailable: the Hub does not answer.
    """
    from transformers import AutoTokenizer

    from trainer.worker.model_source import hub_arguments

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_arguments(recipe))
    except (OSError, ValueError, ImportError) as error:
        raise explained(path, error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {path} has no offsets", hint="save it as a fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {path} has no end-of-sequence token")
    tokenizer.chat_template = recipe.chat_template or tokenizer.chat_template or ZEPHYR_TEMPLATE
    # The end-of-sequence token may be the padding token: labels are masked by length, not by token.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


class Renderer:
    """Renders chats with the template of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, insert_system: bool) -> None:
        self._tokenizer = tokenizer
        self._insert_system = insert_system and self._renders_system()

    def chat(self, messages: Sequence[Message], *, assistant_only: bool) -> Text:
        """Render a whole chat; all of it is learned, or only the assistant's turns."""
        messages = self._with_system(messages)
        text = self._render(messages)
        if not assistant_only:
            return Text(text, ((0, len(text)),))
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return Text(text, tuple(self._turn(messages, number, text) for number in turns))

    def completion(self, prompt: Sequence[Message], completion: Sequence[Message]) -> Text:
        """Render a prompt and its completion; only the completion is learned, up to the end-of-sequence token."""
        messages = self._with_system([*prompt, *completion])
        prompt_turns = len(messages) - len(completion)
        text = self._render(messages)
        if text.rstrip().endswith(self._tokenizer.eos_token):
            text = text.rstrip()  # Zephyr's template writes a newline after the end-of-sequence token
        return Text(text, ((self._prompt_end(messages[:prompt_turns], text), len(text)),))

    def plain(self, prompt: str, completion: str) -> Text:
        """Join a prompt and a completion without a template, and add the end-of-sequence token."""
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
        """Add an empty system message to a chat without one, as the alignment handbook does."""
        if self._insert_system and messages[0]["role"] != "system":
            return [{"role": "system", "content": ""}, *messages]
        return list(messages)

    def _renders_system(self) -> bool:
        """Return whether the template renders a system message; some templates ignore it, and some raise an error."""
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
                f"the chat template rejects a chat of {', '.join(message['role'] for message in messages)}: {error}",
                hint="set another template as `chat_template`, or remove such rows from the data",
            ) from error
        return text


def _common_length(first: str, second: str) -> int:
    if second.startswith(first):  # the common case, and fast
        return len(first)
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )

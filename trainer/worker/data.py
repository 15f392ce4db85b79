"""Rows to token ids. We tokenise ourselves: TRL drops pairs without a word and knows no prompt length."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped,import-not-found,unused-ignore]
import xxhash

from trainer.errors import DataError
from trainer.method import TrainingMethod
from trainer.recipe import Recipe
from trainer.worker.chat_template import Renderer, Text, Tokenizer
from trainer.worker.row_formats import (
    Chat,
    Malformed,
    Pair,
    check_columns,
    dpo_form,
    sft_form,
)
from trainer.worker.sources import Row

log = logging.getLogger(__name__)
Item = TypeVar("Item")

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""
KEEP_ALL = ("wrapped", "bfd_split")
"""Ways of TRL's to pack that carry on in another sequence what does not fit into one."""
ROWS_AT_ONCE = 1000
TELL_EVERY_S = 20.0
SEPARATOR = np.array([-1], dtype=np.int32)  # no token id, so that moved boundaries change the fingerprint

TokenRow = dict[str, np.ndarray[Any, np.dtype[np.int32]]]


@dataclass(frozen=True)
class TokenizedDataset:
    """A data set ready for TRL."""

    dataset: Any
    """`datasets.Dataset`: input_ids, labels; or prompt_ids, chosen_ids, rejected_ids."""
    tokens: int
    """Of all rows; a pair's prompt counts once."""
    fingerprint: str
    """xxh3_128 over every token id, in order: what a resumed run must find again."""


class _Encoded(NamedTuple):
    ids: list[int]
    ends: list[int]
    """Where each token's characters end."""


def for_sft(rows: Sequence[Row], tokenizer: Tokenizer, recipe: Recipe, name: str) -> TokenizedDataset:
    """`input_ids` and `labels`, cut to `max_length` unless TRL packs what is beyond it elsewhere.

    Raises:
        DataError: the columns are of no form for SFT, or not one row can be used.
    """
    settings = {"max_length": recipe.training_method.max_length, **recipe.trainer_args}
    renderer = Renderer(tokenizer, insert_system=recipe.auto_insert_empty_system_msg)
    completion_only = settings.get("completion_only_loss") is not False

    def text(row: Row) -> list[Text]:
        form = sft_form(row)
        if isinstance(form, Chat):
            return [renderer.chat(form.messages, assistant_only=bool(settings.get("assistant_only_loss")))]
        written = _completion(renderer, form.prompt, form.completion)
        return [written if completion_only else _learn_all(written)]

    def tokens(texts: list[Text], encoded: list[_Encoded]) -> TokenRow:
        return sft_row(encoded[0], texts[0].learned, cut=_cut(settings))

    return _tokenise(rows, tokenizer, recipe.training_method, name, text, tokens)


def for_dpo(rows: Sequence[Row], tokenizer: Tokenizer, recipe: Recipe, name: str) -> TokenizedDataset:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`, the prompt cut to `max_prompt_length`.

    Raises:
        DataError: the columns are of no form for DPO, or not one row can be used.
    """
    settings = {"max_length": recipe.training_method.max_length, **recipe.trainer_args}
    renderer = Renderer(tokenizer, insert_system=recipe.auto_insert_empty_system_msg)
    keep_end = settings.get("truncation_mode") == "keep_end"  # then only TRL's collator can cut the whole

    def text(row: Row) -> list[Text]:
        form: Pair = dpo_form(row)
        return [_completion(renderer, form.prompt, answer) for answer in (form.chosen, form.rejected)]

    def tokens(texts: list[Text], encoded: list[_Encoded]) -> TokenRow:
        starts = [
            _first_token(one, written.learned[0][0]) for one, written in zip(encoded, texts, strict=True)
        ]
        return dpo_row(
            encoded[0].ids,
            encoded[1].ids,
            prompt_length=min(starts),
            max_prompt_length=recipe.max_prompt_length,
            keep_prompt_end=recipe.truncation_side == "left",
            max_length=None if keep_end else settings["max_length"],
        )

    return _tokenise(rows, tokenizer, recipe.training_method, name, text, tokens)


def sft_row(encoded: _Encoded, learned: Sequence[tuple[int, int]], *, cut: slice) -> TokenRow:
    """One row's ids and labels; raises `Malformed` if nothing to learn is left within `cut`."""
    ids = np.array(encoded.ids, dtype=np.int32)
    labels = np.full_like(ids, IGNORED)
    for start, end in learned:
        tokens = slice(_first_token(encoded, start), _first_token(encoded, end))
        labels[tokens] = ids[tokens]
    if not (labels[cut] != IGNORED).any():
        raise Malformed("nothing to learn within max_length")
    return {"input_ids": ids[cut], "labels": labels[cut]}


def dpo_row(
    chosen: Sequence[int],
    rejected: Sequence[int],
    *,
    prompt_length: int,
    max_prompt_length: int | None,
    keep_prompt_end: bool,
    max_length: int | None,
) -> TokenRow:
    """One pair, given each answer's ids after the prompt's; raises `Malformed` if an answer would vanish."""
    shared = 0  # tokens may merge across the end of the prompt, and then differ before it
    while shared < min(prompt_length, len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if max_prompt_length is not None:
        prompt = prompt[-max_prompt_length:] if keep_prompt_end else prompt[:max_prompt_length]
    room = None if max_length is None else max_length - len(prompt)
    if room is not None and room <= 0:
        raise Malformed("the prompt alone fills max_length")
    row = {
        "prompt_ids": prompt,
        "chosen_ids": chosen[shared:][:room],
        "rejected_ids": rejected[shared:][:room],
    }
    if not (row["chosen_ids"] and row["rejected_ids"]):
        raise Malformed("an answer has no tokens of its own")
    return {name: np.array(ids, dtype=np.int32) for name, ids in row.items()}


def _completion(renderer: Renderer, prompt: Any, completion: Any) -> Text:
    return (renderer.plain if isinstance(prompt, str) else renderer.completion)(prompt, completion)


def _learn_all(text: Text) -> Text:
    return Text(text.text, ((0, len(text.text)),), text.add_special_tokens)


def _cut(settings: Mapping[str, Any]) -> slice:
    max_length = settings["max_length"]
    if max_length is None or (settings.get("packing") and settings.get("packing_strategy") in KEEP_ALL):
        return slice(None)
    return slice(-max_length, None) if settings.get("truncation_mode") == "keep_end" else slice(max_length)


def _first_token(encoded: _Encoded, character: int) -> int:
    """The first token that reaches beyond `character` characters; tokens of no characters reach nowhere."""
    return next((number for number, end in enumerate(encoded.ends) if end > character), len(encoded.ends))


def _tokenise(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    method: TrainingMethod,
    name: str,
    text: Callable[[Row], list[Text]],
    tokens: Callable[[list[Text], list[_Encoded]], TokenRow],
) -> TokenizedDataset:
    """Write, encode and cut every row; count those that cannot be used and say why, once."""
    import datasets

    reasons: Counter[str] = Counter()
    tables: list[pa.Table] = []
    digest = xxhash.xxh3_128()
    count = done = 0
    told = time.monotonic()
    for chunk in _chunks(rows):
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            log.info("%s data: %d of %d rows are tokenised", name, done, len(rows))
        done += len(chunk)
        check_columns(chunk[0], method)
        written = list(_usable(text, ((row,) for row in chunk), reasons))
        encoded = iter(_encode([one for texts in written for one in texts], tokenizer))
        pieces = ((texts, [next(encoded) for _ in texts]) for texts in written)
        kept = list(_usable(tokens, pieces, reasons))
        for column, array in ((column, array) for row in kept for column, array in row.items()):
            count += len(array) if column != "labels" else 0
            digest.update(array.tobytes())
            digest.update(SEPARATOR.tobytes())
        if kept:
            tables.append(pa.table({column: _column([row[column] for row in kept]) for column in kept[0]}))
    _report(name, len(rows), reasons)
    return TokenizedDataset(datasets.Dataset(pa.concat_tables(tables)), count, digest.hexdigest())


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, ROWS_AT_ONCE)):
        yield chunk


def _usable(
    make: Callable[..., Item], arguments: Iterable[tuple[Any, ...]], reasons: Counter[str]
) -> Iterator[Item]:
    """What `make` gives for each, less the malformed, which are counted."""
    for each in arguments:
        try:
            yield make(*each)
        except Malformed as malformed:
            reasons[str(malformed)] += 1


def _encode(texts: Sequence[Text], tokenizer: Tokenizer) -> list[_Encoded]:
    """Many at once, so that the tokenizer can use every core that it is given."""
    found: dict[int, _Encoded] = {}
    for special in (False, True):
        numbers = [number for number, text in enumerate(texts) if text.add_special_tokens == special]
        if numbers:
            batch = tokenizer(
                [texts[number].text for number in numbers],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for number, ids, offsets in zip(
                numbers, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                found[number] = _Encoded(ids, [end for _, end in offsets])
    return [found[number] for number in range(len(texts))]


def _column(arrays: Sequence[Any]) -> pa.Array:
    return pa.array(arrays, type=pa.list_(pa.int32()))


def _report(name: str, count: int, reasons: Counter[str]) -> None:
    """Say how many rows are not used and why; raise `DataError` if none is left."""
    if not count:
        raise DataError(f"the {name} data are empty")
    if not reasons:
        return
    why = ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
    unused = reasons.total()
    if unused == count:
        raise DataError(f"0 of {count} {name} rows usable; the first reason: {next(iter(reasons))}", hint=why)
    log.warning("%s data: %d of %d rows are not used: %s", name, unused, count, why)

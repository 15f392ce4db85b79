"""Turns rows into token ids. TRL's own tokenization is not used: it silently drops pairs, and has no prompt length."""

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
"""The label that PyTorch's cross entropy ignores."""
KEEP_ALL = ("wrapped", "bfd_split")
"""Packing strategies of TRL that continue a row that does not fit in another sequence."""
ROWS_AT_ONCE = 1000
PROGRESS_EVERY_S = 20.0
SEPARATOR = np.array([-1], dtype=np.int32)
"""Hashed after each row. It is not a token id, so a moved boundary between rows changes the fingerprint."""

TokenRow = dict[str, np.ndarray[Any, np.dtype[np.int32]]]


@dataclass(frozen=True)
class TokenizedDataset:
    """A data set ready for TRL."""

    dataset: Any
    """`datasets.Dataset`: input_ids, labels; or prompt_ids, chosen_ids, rejected_ids."""
    tokens: int
    """Number of tokens of all rows; the prompt of a pair counts once."""
    fingerprint: str
    """xxh3_128 digest of all token ids in order. It must be the same when the run resumes."""


class _Encoded(NamedTuple):
    ids: list[int]
    ends: list[int]
    """For each token, the position after its last character."""


def for_sft(rows: Sequence[Row], tokenizer: Tokenizer, recipe: Recipe, name: str) -> TokenizedDataset:
    """Return `input_ids` and `labels`, cut to `max_length` unless TRL packs the rest into another sequence.

    Raises:
        DataError: the columns have no form that SFT can use, or no row is usable.
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
    """Return `prompt_ids`, `chosen_ids` and `rejected_ids`, with the prompt cut to `max_prompt_length`.

    Raises:
        DataError: the columns have no form that DPO can use, or no row is usable.
    """
    settings = {"max_length": recipe.training_method.max_length, **recipe.trainer_args}
    renderer = Renderer(tokenizer, insert_system=recipe.auto_insert_empty_system_msg)
    # With `keep_end`, TRL's collator cuts prompt and answer together.
    keep_end = settings.get("truncation_mode") == "keep_end"

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
    """Return the ids and labels of a row; raise `Malformed` if none of the tokens in `cut` is learned."""
    ids = np.array(encoded.ids, dtype=np.int32)
    labels = np.full_like(ids, IGNORED)
    for start, end in learned:
        tokens = slice(_first_token(encoded, start), _first_token(encoded, end))
        labels[tokens] = ids[tokens]
    if not (labels[cut] != IGNORED).any():
        raise Malformed("no token to learn within max_length")
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
    """Return the ids of a pair; raise `Malformed` if cutting leaves an answer without tokens.

    `chosen` and `rejected` are the ids of the prompt followed by the answer.
    """
    # The prompt is the common beginning of both.
    shared = 0  # a token may span the end of the prompt, so the two may differ before `prompt_length`
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
    """Return the first token that ends after `character`. Tokens without characters are skipped."""
    return next((number for number, end in enumerate(encoded.ends) if end > character), len(encoded.ends))


def _tokenise(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    method: TrainingMethod,
    name: str,
    text: Callable[[Row], list[Text]],
    tokens: Callable[[list[Text], list[_Encoded]], TokenRow],
) -> TokenizedDataset:
    """Render, encode and cut every row; log once how many rows are unusable and why."""
    import datasets

    reasons: Counter[str] = Counter()
    tables: list[pa.Table] = []
    digest = xxhash.xxh3_128()
    count = done = 0
    logged = time.monotonic()
    # Rows are processed in chunks, so that Python objects of all rows never exist at the same time.
    for chunk in _chunks(rows):
        if time.monotonic() - logged >= PROGRESS_EVERY_S:
            logged = time.monotonic()
            log.info("%s data: %d of %d rows are tokenized", name, done, len(rows))
        done += len(chunk)
        check_columns(chunk[0], method)
        written = list(_usable(text, ((row,) for row in chunk), reasons))
        encoded = iter(_encode([one for texts in written for one in texts], tokenizer))
        pieces = ((texts, [next(encoded) for _ in texts]) for texts in written)
        usable = list(_usable(tokens, pieces, reasons))
        for column, array in ((column, array) for row in usable for column, array in row.items()):
            count += len(array) if column != "labels" else 0
            digest.update(array.tobytes())
            digest.update(SEPARATOR.tobytes())
        if usable:
            tables.append(
                pa.table({column: _column([row[column] for row in usable]) for column in usable[0]})
            )
    _report(name, len(rows), reasons)
    return TokenizedDataset(datasets.Dataset(pa.concat_tables(tables)), count, digest.hexdigest())


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, ROWS_AT_ONCE)):
        yield chunk


def _usable(
    make: Callable[..., Item], arguments: Iterable[tuple[Any, ...]], reasons: Counter[str]
) -> Iterator[Item]:
    """Yield the results of `make`; count malformed rows by their reason."""
    for values in arguments:
        try:
            yield make(*values)
        except Malformed as malformed:
            reasons[str(malformed)] += 1


def _encode(texts: Sequence[Text], tokenizer: Tokenizer) -> list[_Encoded]:
    """Encode many texts at once, so that the tokenizer uses all of its cores."""
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
    """Log how many rows are not used and why; raise `DataError` if no row is left."""
    if not count:
        raise DataError(f"the {name} data are empty")
    if not reasons:
        return
    why = ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
    unused = reasons.total()
    if unused == count:
        raise DataError(f"0 of {count} {name} rows usable; the first reason: {next(iter(reasons))}", hint=why)
    log.warning("%s data: %d of %d rows are not used: %s", name, unused, count, why)

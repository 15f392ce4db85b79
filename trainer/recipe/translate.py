"""Recipes of the last years, read as today's: each key renamed, ignored or refused, and each told once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainer.errors import RecipeError
from trainer.recipe.old_keys import GONE, IGNORED, RENAMED

Keys = dict[str, Any]


class Translated(NamedTuple):
    """Keys as they are called today, and what was done to get there, a line each."""

    keys: Keys
    notes: tuple[str, ...]


def translate(keys: Mapping[str, Any], *, source: str) -> Translated:
    """Today's keys for those of a file or of the command line (`source`); unknown keys stay as they are.

    Raises:
        RecipeError: a key asks for what TRL can do no more, or is given under its old and its new name.
    """
    today: Keys = {key: value for key, value in keys.items() if key not in UNDERSTOOD}
    notes: list[str] = []
    for key, value in keys.items():
        if key in UNDERSTOOD and key not in IGNORED:
            new, note = _translate_one(key, value, keys, source)
            _check_said_once(key, value, new, today, source)
            today.update(new)
            notes += [note] if note else []
    return Translated(today, (*notes, *_ignored(keys)))


def show(value: Any) -> str:
    """A value as YAML would have it, on one line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class _RefusedError(Exception):
    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def _translate_one(key: str, value: Any, keys: Mapping[str, Any], source: str) -> tuple[Keys, str]:
    """What one old key becomes, and the note."""
    if key in RENAMED:
        return {RENAMED[key]: value}, f"`{key}` is called `{RENAMED[key]}` now"
    if key in _SPECIAL:
        try:
            return _SPECIAL[key](value, keys)
        except _RefusedError as refused:
            raise RecipeError(f"{source}: `{key}: {show(value)}`: {refused}", hint=refused.hint) from None
    gone = GONE[key]
    if any(value == harmless and type(value) is type(harmless) for harmless in gone.harmless):
        return {}, f"`{key}: {show(value)}` is ignored: the key is gone, and this value asked for nothing"
    raise RecipeError(f"{source}: `{key}: {show(value)}` cannot be had: {gone.reason}", hint=gone.hint)


def _check_said_once(key: str, value: Any, new: Keys, today: Keys, source: str) -> None:
    for name in new:
        if name in today and today[name] != new[name]:
            raise RecipeError(
                f"{source}: `{key}: {show(value)}` and `{name}: {show(today[name])}` are the same key",
                hint=f"drop `{key}`",
            )


def _ignored(keys: Mapping[str, Any]) -> list[str]:
    """One note for each reason, with the keys it holds for."""
    by_reason: dict[str, list[str]] = {}
    for key in keys:
        if key in IGNORED:
            by_reason.setdefault(IGNORED[key], []).append(f"`{key}`")
    return [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} ignored: {reason}"
        for reason, names in by_reason.items()
    ]


def _torch_dtype(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is None:  # Transformers 4 loaded float32 then; Transformers 5 would take the type in the file
        return {"dtype": "float32"}, "`torch_dtype: null` is `dtype: float32` now"
    return {"dtype": value}, "`torch_dtype` is called `dtype` now"


def _flash_attention(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is True:
        new = {"attn_implementation": "flash_attention_2"}
        return new, "`use_flash_attention_2: true` is `attn_implementation: flash_attention_2` now"
    return {}, "`use_flash_attention_2` is ignored: `attn_implementation` says it now"


def _warmup_ratio(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    if steps := keys.get("warmup_steps"):  # as Transformers did while it had both
        return {}, f"`warmup_ratio` is ignored: `warmup_steps: {show(steps)}` wins over it"
    try:
        ratio = float(value or 0)
    except (TypeError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise _RefusedError(
            "a ratio is a number from 0 to below 1", "`warmup_steps` takes a count of steps, too"
        )
    return {"warmup_steps": ratio}, f"`warmup_ratio` is `warmup_steps: {ratio}` now (below 1 it is a ratio)"


def _max_seq_length(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    """The handbook's scripts for SFT packed whatever its files said, from 2023 to July 2025."""
    new, note = {"max_length": value}, "`max_seq_length` is called `max_length` now"
    if "dataset_mixer" not in keys or "packing" in keys:
        return new, note
    packed = {"packing": True, "packing_strategy": "wrapped"}
    return {**new, **packed}, f"{note}; `packing: true`, as the handbook of the time did with every file"


def _max_eval_samples(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    return {"max_test_samples": value}, "`max_eval_samples` is called `max_test_samples` now"


def _adafactor(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is True:
        return {"optim": "adafactor"}, "`adafactor: true` is `optim: adafactor` now"
    return {}, "`adafactor` is ignored: `optim` says it now"


def _group_by_length(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is True:
        new = {"train_sampling_strategy": "group_by_length"}
        return new, "`group_by_length: true` is `train_sampling_strategy: group_by_length` now"
    return {}, "`group_by_length` is ignored: `train_sampling_strategy` says it now"


def _reentrant(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    kwargs = keys.get("gradient_checkpointing_kwargs") or {"use_reentrant": value}
    note = (
        "`gradient_checkpointing_use_reentrant` is `gradient_checkpointing_kwargs: {use_reentrant: ...}` now"
    )
    return {"gradient_checkpointing_kwargs": kwargs}, note


def _tokenizer(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    if value in (None, keys.get("model_name_or_path")):
        return {}, "the tokenizer's own key is ignored: it comes with the model"
    raise _RefusedError(
        "the tokenizer comes with the model", "save the model and this tokenizer in one folder"
    )


def _dataset_kwargs(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    """TRL takes `skip_prepare_dataset` only; the special tokens come from the chat template now."""
    if not isinstance(value, Mapping):
        return {"dataset_kwargs": value}, ""
    dropped = [f"`{key}`" for key in value if key != "skip_prepare_dataset"]
    kept = {key: item for key, item in value.items() if key == "skip_prepare_dataset"}
    note = (
        f"{', '.join(dropped)} in `dataset_kwargs` ignored: TRL prepares the data by itself now"
        if dropped
        else ""
    )
    return ({"dataset_kwargs": kept} if kept else {}), note


def _save_strategy(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    note = f"`save_strategy: {show(value)}` is ignored: checkpoints are taken every `save_steps`"
    return {}, "" if value == "steps" else note


_SPECIAL: dict[str, Callable[[Any, Mapping[str, Any]], tuple[Keys, str]]] = {
    "adafactor": _adafactor,
    "dataset_kwargs": _dataset_kwargs,
    "gradient_checkpointing_use_reentrant": _reentrant,
    "group_by_length": _group_by_length,
    "max_eval_samples": _max_eval_samples,
    "max_seq_length": _max_seq_length,
    "save_strategy": _save_strategy,
    "tokenizer": _tokenizer,
    "tokenizer_name_or_path": _tokenizer,
    "torch_dtype": _torch_dtype,
    "use_flash_attention_2": _flash_attention,
    "warmup_ratio": _warmup_ratio,
}

UNDERSTOOD = frozenset({*RENAMED, *IGNORED, *GONE, *_SPECIAL})
"""All the keys that are understood here though the run itself does not take them as they are."""

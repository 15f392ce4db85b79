"""Translate the keys of older recipes to today's keys. Each old key is renamed, ignored or refused, with one note."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainer.errors import RecipeError
from trainer.recipe.old_keys import GONE, IGNORED, RENAMED

Keys = dict[str, Any]


class Translated(NamedTuple):
    """Keys under today's names, and one note for each change."""

    keys: Keys
    notes: tuple[str, ...]


def translate(keys: Mapping[str, Any], *, source: str) -> Translated:
    """Translate the keys of a file or of the command line (`source`, for messages). Unknown keys stay unchanged.

    Raises:
        RecipeError: a key asks for something that TRL no longer supports, or a key is given under its old and its new
            name with different values.
    """
    today: Keys = {key: value for key, value in keys.items() if key not in UNDERSTOOD}
    notes: list[str] = []
    for key, value in keys.items():
        if key in UNDERSTOOD and key not in IGNORED:
            new, note = _translate_one(key, value, keys, source)
            _check_given_once(key, value, new, today, source)
            today.update(new)
            notes += [note] if note else []
    return Translated(today, (*notes, *_ignored(keys)))


def show(value: Any) -> str:
    """Return a value on one line, as in YAML, cut to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class _RefusedError(Exception):
    """An old key whose value cannot be translated."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def _translate_one(key: str, value: Any, keys: Mapping[str, Any], source: str) -> tuple[Keys, str]:
    """Return the keys that one old key becomes, and the note."""
    if key in RENAMED:
        return {RENAMED[key]: value}, f"`{key}` is now called `{RENAMED[key]}`"
    if key in _SPECIAL:
        try:
            return _SPECIAL[key](value, keys)
        except _RefusedError as refused:
            raise RecipeError(f"{source}: `{key}: {show(value)}`: {refused}", hint=refused.hint) from None
    gone = GONE[key]
    if any(value == harmless and type(value) is type(harmless) for harmless in gone.harmless):
        return (
            {},
            f"`{key}: {show(value)}` is ignored: the key no longer exists, and this value has no effect",
        )
    raise RecipeError(f"{source}: `{key}: {show(value)}` is not supported: {gone.reason}", hint=gone.hint)


def _check_given_once(key: str, value: Any, new: Keys, today: Keys, source: str) -> None:
    """Raise if a translated key is also given under its new name, with another value."""
    for name in new:
        if name in today and today[name] != new[name]:
            raise RecipeError(
                f"{source}: `{key}: {show(value)}` and `{name}: {show(today[name])}` set the same key to different values",
                hint=f"remove `{key}`",
            )


def _ignored(keys: Mapping[str, Any]) -> list[str]:
    """Return one note for each reason, with all keys that are ignored for it."""
    by_reason: dict[str, list[str]] = {}
    for key in keys:
        if key in IGNORED:
            by_reason.setdefault(IGNORED[key], []).append(f"`{key}`")
    return [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} ignored: {reason}"
        for reason, names in by_reason.items()
    ]


def _torch_dtype(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if (
        value is None
    ):  # Transformers 4 then loaded float32; Transformers 5 would use the dtype of the model's file
        return {"dtype": "float32"}, "`torch_dtype: null` is now `dtype: float32`"
    return {"dtype": value}, "`torch_dtype` is now called `dtype`"


def _flash_attention(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is True:
        new = {"attn_implementation": "flash_attention_2"}
        return new, "`use_flash_attention_2: true` is now `attn_implementation: flash_attention_2`"
    return {}, "`use_flash_attention_2` is ignored: `attn_implementation` now decides this"


def _warmup_ratio(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    """Return `warmup_steps`, where Transformers now reads a value below 1 as a ratio."""
    if steps := keys.get("warmup_steps"):  # Transformers had the same rule while it had both keys
        return {}, f"`warmup_ratio` is ignored: `warmup_steps: {show(steps)}` overrides it"
    try:
        ratio = float(value or 0)
    except (TypeError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise _RefusedError(
            "a ratio must be at least 0 and below 1", "use `warmup_steps` for a number of steps"
        )
    return {
        "warmup_steps": ratio
    }, f"`warmup_ratio` is now `warmup_steps: {ratio}` (a value below 1 is a ratio)"


def _max_seq_length(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    """Also turn packing on for recipes in the handbook's old form.

    From 2023 to July 2025 the handbook's SFT scripts packed, whatever the recipe file contained.
    """
    new, note = {"max_length": value}, "`max_seq_length` is now called `max_length`"
    if "dataset_mixer" not in keys or "packing" in keys:
        return new, note
    packed = {"packing": True, "packing_strategy": "wrapped"}
    return {
        **new,
        **packed,
    }, f"{note}; `packing: true` is set, as the handbook's scripts of that time always did"


def _max_eval_samples(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    return {"max_test_samples": value}, "`max_eval_samples` is now called `max_test_samples`"


def _adafactor(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is True:
        return {"optim": "adafactor"}, "`adafactor: true` is now `optim: adafactor`"
    return {}, "`adafactor` is ignored: `optim` now decides this"


def _group_by_length(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    if value is True:
        new = {"train_sampling_strategy": "group_by_length"}
        return new, "`group_by_length: true` is now `train_sampling_strategy: group_by_length`"
    return {}, "`group_by_length` is ignored: `train_sampling_strategy` now decides this"


def _reentrant(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    kwargs = keys.get("gradient_checkpointing_kwargs") or {"use_reentrant": value}
    note = (
        "`gradient_checkpointing_use_reentrant` is now `gradient_checkpointing_kwargs: {use_reentrant: ...}`"
    )
    return {"gradient_checkpointing_kwargs": kwargs}, note


def _tokenizer(value: Any, keys: Mapping[str, Any]) -> tuple[Keys, str]:
    if value in (None, keys.get("model_name_or_path")):
        return {}, "the tokenizer's key is ignored: the tokenizer is loaded from the model's folder"
    raise _RefusedError(
        "the tokenizer is loaded from the model's folder", "save the model and this tokenizer in one folder"
    )


def _dataset_kwargs(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    """Keep `skip_prepare_dataset`, the only key that TRL still reads. Special tokens now come from the chat template."""
    if not isinstance(value, Mapping):
        return {"dataset_kwargs": value}, ""
    dropped = [f"`{key}`" for key in value if key != "skip_prepare_dataset"]
    remaining = {key: item for key, item in value.items() if key == "skip_prepare_dataset"}
    note = (
        f"{', '.join(dropped)} in `dataset_kwargs` ignored: TRL now prepares the data without it"
        if dropped
        else ""
    )
    return ({"dataset_kwargs": remaining} if remaining else {}), note


def _save_strategy(value: Any, _: Mapping[str, Any]) -> tuple[Keys, str]:
    note = f"`save_strategy: {show(value)}` is ignored: a checkpoint is saved every `save_steps` steps"
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
"""All old keys: those that this module translates, ignores or refuses."""

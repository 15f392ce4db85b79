"""The keys that the pinned TRL accepts, with their types. They are read from `fields.json`, so TRL is not needed."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from trainer.method import METHODS

PATH = Path(__file__).with_name("fields.json")
CONFIGS = {**{name: method.config_class for name, method in METHODS.items()}, "model": "ModelConfig"}
"""The classes of TRL that `fields.json` describes: one for each training method, and one for the model."""


class Field(NamedTuple):
    """One key: its type as text (`str | None`), its default, and the only values it may have, if it is limited to some."""

    type: str
    default: Any = None
    choices: tuple[str, ...] = ()


@cache
def of(config: str) -> Mapping[str, Field]:
    """Return the keys of a training method, such as `dpo`, or of `model`."""
    entries = json.loads(PATH.read_text())[CONFIGS[config]]
    return {
        name: Field(entry["type"], entry.get("default"), tuple(entry.get("choices", ())))
        for name, entry in entries.items()
    }


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to this one, or None if none is similar."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)), None)


def convert(value: Any, field: Field) -> Any:
    """Return the value in the field's type, with YAML's misreadings corrected.

    PyYAML reads `2e-5` as text and `no` as false.

    Raises:
        ValueError: the value does not have the type, or is not an allowed one. The message names what is expected.
    """
    if value is False and "no" in field.choices:
        value = "no"
    types = _alternatives(field.type)
    for attempt in (_exact, _lenient):
        for name in types:
            try:
                converted = attempt(value, name)
            except ValueError:
                continue
            _check_choice(converted, field.choices)
            return converted
    quotes = "; write it in quotes" if "str" in types and isinstance(value, int | float) else ""
    raise ValueError(f"must be {expected(field)}{quotes}")


def expected(field: Field) -> str:
    """Return the type in words, for messages."""
    if field.choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in field.choices)
    return " or ".join(_in_words(name) for name in _alternatives(field.type) if name != "None")


def _alternatives(type_text: str) -> list[str]:
    """Return the members of the outer union: `dict[str, int | str] | None` has two."""
    return re.split(r" \| (?![^\[]*\])", type_text)


def _in_words(name: str) -> str:
    if name.startswith("list["):
        return f"a list, each {_in_words(name[5:-1])}"
    plain = {"bool": "`true` or `false`", "int": "a whole number", "float": "a number", "str": "text"}
    return plain.get(name, "a mapping")


def _exact(value: Any, name: str) -> Any:
    """Return the value if it already has the type; raise ValueError otherwise."""
    plain_types: dict[str, tuple[type, ...]] = {
        "None": (type(None),),
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "str": (str,),
    }
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) in plain_types.get(name, ()) and finite:  # isinstance would take a bool for an int
        return value
    if name.startswith("list[") and isinstance(value, list):
        return [convert(item, Field(name[5:-1])) for item in value]
    if name.startswith("dict") and isinstance(value, Mapping):
        return plain(value)
    raise ValueError(name)


def _lenient(value: Any, name: str) -> Any:
    """Return the value converted to the type if its meaning is certain; raise ValueError otherwise."""
    if name.startswith("list[") and isinstance(value, str | int | float):
        # A string on a command line may be a list: `q_proj,v_proj`.
        items = value.split(",") if isinstance(value, str) else [value]
        return [convert(item, Field(name[5:-1])) for item in items]
    if name not in ("int", "float") or isinstance(value, bool) or not isinstance(value, str | float):
        raise ValueError(name)
    number = float(value)
    if not math.isfinite(number) or (name == "int" and not number.is_integer()):
        raise ValueError(name)
    return int(number) if name == "int" else number


def plain(value: Any) -> Any:
    """Return nested values in a form that JSON can represent; raise ValueError if there is none.

    Text such as `1e-6` becomes a number, because YAML reads it as text.
    """
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("the keys of a mapping must be text")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _check_choice(value: Any, choices: tuple[str, ...]) -> None:
    for item in value if isinstance(value, list) else [value]:
        if choices and isinstance(item, str) and item not in choices:
            near = nearest(item, choices)
            suggestion = f"; did you mean `{near}`?" if near else ""
            raise ValueError("must be one of " + ", ".join(f"`{choice}`" for choice in choices) + suggestion)

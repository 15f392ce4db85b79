"""`python -m trainer.recipe.generate_fields`: write `fields.json` from the installed TRL (trainer environment only)."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import re
import sys
import types
import typing
from importlib.metadata import version
from typing import Any

from trainer.recipe.fields import CONFIGS, PATH


def describe() -> dict[str, Any]:
    """Return the content of `fields.json` for the installed TRL. Importing TRL takes seconds."""
    import trl

    return {
        "versions": {name: version(name) for name in ("trl", "transformers")},
        **{name: _fields_of(getattr(trl, name)) for name in CONFIGS.values()},
    }


def text() -> str:
    """Return the text of `fields.json`: one line per field, so that a diff shows what a new TRL changes."""
    sections = []
    for section, entries in describe().items():
        lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
        sections.append(f"  {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _fields_of(config: type[Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a config class, by field name."""
    hints = typing.get_type_hints(config)
    return {
        field.name: _entry(field, hints[field.name]) for field in dataclasses.fields(config) if field.init
    }


def _entry(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Return the type of a field, its default if JSON can hold it, and its choices."""
    entry: dict[str, Any] = {"type": " | ".join(_parts(hint))}
    default = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(default, enum.Enum):
        default = default.value
    if default is None or isinstance(default, bool | int | float | str | list | dict):
        entry["default"] = default
    choices = field.metadata.get("choices") or _choices(hint) or _choices_in(field.metadata.get("help", ""))
    if choices and all(isinstance(choice, str) for choice in choices):
        entry["choices"] = list(choices)
    return entry


def _parts(hint: Any) -> list[str]:
    """Return the plain types of a union: `str | None` gives ["str", "None"]. An enum and a Literal count as str."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = dict.fromkeys(part for member in typing.get_args(hint) for part in _parts(member))
        return sorted(parts, key=lambda part: part == "None")
    if origin is typing.Literal:
        return list(dict.fromkeys(type(choice).__name__ for choice in typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ["str"]
    if origin is not None:
        members = ", ".join(" | ".join(_parts(member)) for member in typing.get_args(hint))
        return [f"{origin.__name__}[{members}]"]
    if hint is type(None):
        return ["None"]
    return [getattr(hint, "__name__", str(hint))]


def _choices(hint: Any) -> list[str]:
    """Return the values of an enum or a Literal in a type hint."""
    for member in (hint, *typing.get_args(hint)):
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return [choice.value for choice in member]
        if typing.get_origin(member) is typing.Literal:
            return [choice for choice in typing.get_args(member) if isinstance(choice, str)]
    return []


def _choices_in(help_text: str) -> list[str]:
    """Return the values that a help text lists. DPO's `loss_type` lists its values only there."""
    _, found, rest = help_text.partition("Possible values are: ")
    return re.findall(r"`'?(\w+)'?`", rest.split(". ")[0]) if found else []


def main() -> None:
    argparse.ArgumentParser(prog="python -m trainer.recipe.generate_fields", description=__doc__).parse_args()
    PATH.write_text(text())
    sys.stdout.write(f"wrote {PATH}\n")


if __name__ == "__main__":
    main()

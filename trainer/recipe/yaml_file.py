"""The text of recipes: YAML files, the shipped ones found by name, and the `key=value` words of a command line."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.errors import RecipeError
from trainer.recipe.fields import nearest

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
DATA = (".jsonl", ".parquet")
COMMAND_LINE = "command line"
FAMILY = "zephyr-7b"
"""Recipes of this family can be named without it: `dpo_full` is `zephyr-7b/dpo_full`."""


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects duplicate keys and reads dates as plain text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, and raise if a key is given twice. PyYAML would keep the last value silently."""
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"`{key}` is given twice, first in line {first[key]}",
                    problem_mark=key_node.start_mark,
                )
            first[key] = line
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    character: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Overrides(NamedTuple):
    """The `key=value` words of a command line."""

    flat: dict[str, Any]
    dotted: dict[tuple[str, ...], Any]
    """`tiny.hidden_size=64` as ("tiny", "hidden_size"): 64."""


def names() -> list[str]:
    """Return the names of the shipped recipes, such as `zephyr-tiny/dpo`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob("*/*.yaml"))


def find(source: str | Path) -> Path:
    """Return the file of a recipe, given its path or its name.

    Raises:
        RecipeError: there is no such recipe. The hint has the nearest name.
    """
    path = Path(source).expanduser()
    shipped = RECIPES / f"{source}.yaml"
    if path.suffix.lower() in DATA:
        raise RecipeError(
            f"{source} is a data file, not a recipe",
            hint=f"name a recipe first: `zephyr-7b/dpo_full dataset_mixture={source}`",
        )
    if path.is_file():
        return path.resolve()
    if str(source) in names():
        return shipped
    if f"{FAMILY}/{source}" in names():
        return RECIPES / FAMILY / f"{source}.yaml"
    if path.is_dir():
        raise RecipeError(f"recipe {source} is a folder, not a file", hint=_suggest(str(source)))
    raise RecipeError(f"no recipe {source}: no such file, and no shipped recipe", hint=_suggest(str(source)))


def read(path: Path, *, label: str) -> dict[str, Any]:
    """Return the keys of a file. Errors call the file `label`.

    Raises:
        RecipeError: the file is not YAML (the message has line and column), or not a mapping.
    """
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{label}{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{label} is not YAML in UTF-8: {error}") from None
    except OSError as error:
        raise RecipeError(f"{label} cannot be read: {error.strerror}") from None
    if keys is None:
        raise RecipeError(
            f"{label} is empty", hint="a recipe needs at least a model, data and a global batch size"
        )
    if not isinstance(keys, dict):
        raise RecipeError(
            f"{label} contains a {type(keys).__name__}, not a mapping", hint="write `key: value` lines"
        )
    return {str(key): value for key, value in keys.items()}


def parse(overrides: Sequence[str]) -> Overrides:
    """Parse `key=value` words, with each value in YAML. A later word overrides an earlier one.

    Raises:
        RecipeError: a word is not `key=value`, or a value is not YAML.
    """
    flat: dict[str, Any] = {}
    dotted: dict[tuple[str, ...], Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise RecipeError(
                f"{COMMAND_LINE}: {word!r} is not `key=value`", hint="write it as `learning_rate=2e-5`"
            )
        value = _value(key, text)
        if "." in key:
            dotted[tuple(key.split("."))] = value
        else:
            flat[key] = value
    return Overrides(flat, dotted)


def set_dotted(keys: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set `value` at a dotted key, in place. A number is an index into a list. Missing mappings are created.

    Raises:
        RecipeError: the path leads through a plain value, or past the end of a list.
    """
    dotted = ".".join(path)
    parent: Any = keys
    # Walk down part by part. `following` is None at the last part, where the value is set.
    for part, following in zip(path, (*path[1:], None), strict=True):
        key: Any = int(part) if isinstance(parent, list) and part.isdecimal() else part
        if isinstance(parent, list) and (key == part or key >= len(parent)):
            raise RecipeError(
                f"{COMMAND_LINE}: `{dotted}`: {part} is not an index of `{_above(path, part)}`",
                hint=f"it is a list with the indices 0 to {len(parent) - 1}",
            )
        if not isinstance(parent, dict | list):
            raise RecipeError(
                f"{COMMAND_LINE}: `{dotted}`: `{_above(path, part)}` has no keys below it",
                hint=f"set `{_above(path, part)}` itself, or check the key's name",
            )
        if following is None:
            parent[key] = value
        elif isinstance(parent, dict):
            # A key that is missing or null becomes a mapping, so that it can hold the rest of the path.
            parent[key] = {} if parent.get(key) is None else parent[key]
            parent = parent[key]
        else:
            parent = parent[key]


def _above(path: tuple[str, ...], part: str) -> str:
    return ".".join(path[: path.index(part)])


def _value(key: str, text: str) -> Any:
    """Parse one value of the command line as YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(
            f"{COMMAND_LINE}: the value of `{key}` is not YAML: {text}", hint="put it in quotes"
        ) from None


def _suggest(source: str) -> str:
    """Return a hint for a recipe that does not exist: the nearest name, or all names."""
    known = names()
    short = [name.removeprefix(f"{FAMILY}/") for name in known]
    near = nearest(source.removesuffix(".yaml"), [*known, *short])
    if near:
        return f"did you mean `{near}`?"
    return (
        "shipped recipes: " + ", ".join(f"`{name}`" for name in known)
        if known
        else "give the path of a YAML file"
    )

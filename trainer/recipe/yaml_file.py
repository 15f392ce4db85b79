"""Recipes as text: the YAML files, the shipped ones by name, and `key=value` of a command line."""

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
"""Whose recipes are found by their method alone: `dpo_full` is `zephyr-7b/dpo_full`."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that takes no key twice, and leaves dates as the text they are written as."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
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
    """`key=value` of a command line."""

    flat: dict[str, Any]
    dotted: dict[tuple[str, ...], Any]
    """`tiny.hidden_size=64` as ("tiny", "hidden_size"): 64."""


def names() -> list[str]:
    """The shipped recipes, such as `zephyr-tiny/dpo`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob("*/*.yaml"))


def find(source: str | Path) -> Path:
    """The file of a recipe, given by its path or its name.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    path = Path(source).expanduser()
    shipped = RECIPES / f"{source}.yaml"
    if path.suffix.lower() in DATA:
        raise RecipeError(
            f"{source} is data, and no recipe", hint=f"as in `zephyr-7b/dpo_full dataset_mixture={source}`"
        )
    if path.is_file():
        return path.resolve()
    if str(source) in names():
        return shipped
    if f"{FAMILY}/{source}" in names():
        return RECIPES / FAMILY / f"{source}.yaml"
    if path.is_dir():
        raise RecipeError(f"recipe {source} is a folder", hint=_suggest(str(source)))
    raise RecipeError(
        f"there is no recipe {source}, neither as a file nor by name", hint=_suggest(str(source))
    )


def read(path: Path, *, label: str) -> dict[str, Any]:
    """The keys of a file, called `label` in errors.

    Raises:
        RecipeError: no YAML (with line and column), or no mapping.
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
            f"{label} is empty", hint="a recipe has at least a model, data and a global batch size"
        )
    if not isinstance(keys, dict):
        raise RecipeError(
            f"{label} holds a {type(keys).__name__}", hint="a recipe is a mapping: `key: value` lines"
        )
    return {str(key): value for key, value in keys.items()}


def parse(overrides: Sequence[str]) -> Overrides:
    """The keys of `key=value` words, the value in YAML; later ones win.

    Raises:
        RecipeError: a word that is not `key=value`, or a value that is not YAML.
    """
    flat: dict[str, Any] = {}
    dotted: dict[tuple[str, ...], Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise RecipeError(
                f"{COMMAND_LINE}: {word!r} is not `key=value`", hint="as in `learning_rate=2e-5`"
            )
        value = _value(key, text)
        if "." in key:
            dotted[tuple(key.split("."))] = value
        else:
            flat[key] = value
    return Overrides(flat, dotted)


def set_dotted(keys: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set `value` at a dotted key, in place; a number is a place in a list, a missing mapping is made.

    Raises:
        RecipeError: the path leads through what is neither a mapping nor a list, or past a list's end.
    """
    dotted = ".".join(path)
    here: Any = keys
    for part, following in zip(path, (*path[1:], None), strict=True):
        place: Any = int(part) if isinstance(here, list) and part.isdecimal() else part
        if isinstance(here, list) and (place == part or place >= len(here)):
            raise RecipeError(f"{COMMAND_LINE}: `{dotted}`: the list has the places 0 to {len(here) - 1}")
        if not isinstance(here, dict | list):
            raise RecipeError(f"{COMMAND_LINE}: `{dotted}`: there is nothing below `{_above(path, part)}`")
        if following is None:
            here[place] = value
        elif isinstance(here, dict):
            here[place] = {} if here.get(place) is None else here[place]
            here = here[place]
        else:
            here = here[place]


def _above(path: tuple[str, ...], part: str) -> str:
    return ".".join(path[: path.index(part)])


def _value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(
            f"{COMMAND_LINE}: the value of `{key}` is not YAML: {text}", hint="quote it"
        ) from None


def _suggest(source: str) -> str:
    known = names()
    short = [name.removeprefix(f"{FAMILY}/") for name in known]
    near = nearest(source.removesuffix(".yaml"), [*known, *short])
    if near:
        return f"did you mean `{near}`?"
    return (
        "shipped are " + ", ".join(f"`{name}`" for name in known) if known else "give the path of a YAML file"
    )

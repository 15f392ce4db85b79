"""The tasks of `jobs/`: which one a name means, and which recipe it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.errors import UserError
from trainer.recipe import names as recipe_names

JOBS = Path(__file__).resolve().parents[2] / "jobs"
DEFAULT = "dpo_full"


class JobFile(NamedTuple):
    """A task, and what it trains."""

    name: str
    """`dpo_full`: the file's."""
    base: dict[str, Any]
    recipe: str
    """A shipped name, or the path of a file here."""
    overrides: tuple[str, ...]
    """Those of the task itself."""
    gpus: str | None = None
    """`A100:8`, where the task is for these alone."""


def names(folder: Path = JOBS) -> list[str]:
    """The shipped tasks, such as `dpo_full`."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find(source: str | None, *, folder: Path = JOBS) -> JobFile:
    """The task that a name or a file means; a recipe gets the task of its name, else that of its method.

    Args:
        source: a task's name or file, or a recipe's; None is `DEFAULT`.
        folder: of the shipped tasks.

    Raises:
        UserError: a file that is no task, or a task of several parts.
    """
    source = source or DEFAULT
    if source in names(folder):
        return _of_task(folder / f"{source}.yaml")
    if Path(source).is_file() and (found := _task_in(Path(source))):
        return found
    stem = source.rpartition("/")[2].removesuffix(".yaml")
    name = stem if stem in names(folder) else DEFAULT
    task = _of_task(folder / f"{name}.yaml")
    return task._replace(recipe=source, overrides=(), gpus=None)


def recipe_of(source: str, *, folder: Path = JOBS) -> str:
    """The recipe that a name means where no task is needed: a recipe's own name or file goes before a task's."""
    known = recipe_names()
    is_recipe = source in known or any(name.endswith(f"/{source}") for name in known)
    return find(source, folder=folder).recipe if source in names(folder) and not is_recipe else source


def _task_in(path: Path) -> JobFile | None:
    """None for a file that is a recipe, or that cannot be read: the reader of recipes says what is wrong."""
    try:
        return _of_task(path) if "run" in (_documents(path) or [{}])[-1] else None
    except (OSError, yaml.YAMLError):
        return None


def _of_task(path: Path) -> JobFile:
    documents = [each for each in _documents(path) if set(each) - {"name", "execution"}]
    if len(documents) != 1:
        raise UserError(
            f"{path.name} has {len(documents)} tasks, one after the other; submit takes one at a time",
            hint=f"sky jobs launch {path} --env CHECKPOINTS=…",
        )
    base = documents[0]
    envs = base.get("envs") or {}
    if not envs.get("RECIPE"):
        raise UserError(
            f"{path} names no recipe", hint="give it `envs: {RECIPE: …}`, as jobs/dpo_full.yaml has it"
        )
    words = str(envs.get("OVERRIDES") or "").split()
    return JobFile(path.stem, base, str(envs["RECIPE"]), tuple(words), _gpus(base.get("resources") or {}))


def _gpus(resources: dict[str, Any]) -> str | None:
    entries = [resources, *(resources.get("ordered") or resources.get("any_of") or ())]
    named = {str(entry["accelerators"]) for entry in entries if entry.get("accelerators")}
    return named.pop() if len(named) == 1 else None


def _documents(path: Path) -> list[dict[str, Any]]:
    loaded = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return [each for each in loaded if isinstance(each, dict)]

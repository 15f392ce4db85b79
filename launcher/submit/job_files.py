"""Find the task file of `jobs/` that a name means, and the recipe that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.errors import UserError
from trainer.recipe import names as recipe_names

JOBS = Path(__file__).resolve().parents[2] / "jobs"
DEFAULT = "dpo_full"


class JobFile(NamedTuple):
    """A task file and the recipe that it trains."""

    name: str
    """Name of the file, such as `dpo_full`."""
    base: dict[str, Any]
    recipe: str
    """A shipped name, or the path of a file on this machine."""
    overrides: tuple[str, ...]
    """Overrides of the task itself."""
    gpus: str | None = None
    """`A100:8` if the task is for these GPUs only."""


def names(folder: Path = JOBS) -> list[str]:
    """Return the names of the shipped tasks, such as `dpo_full`."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find(source: str | None, *, folder: Path = JOBS) -> JobFile:
    """Return the task that a name or a file means. A recipe gets the task of its name, else the default task.

    Args:
        source: name or file of a task or a recipe; None: `DEFAULT`.
        folder: folder of the shipped tasks.

    Raises:
        UserError: the file is not a task, or it is a pipeline of several tasks.
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


def find_local(source: str | None, *, folder: Path = JOBS) -> JobFile:
    """Return the job file for a run on this machine, which needs no task.

    If both a recipe and a task have the name, the recipe is used. If only a task has it, the task's recipe is used.
    """
    source = source or DEFAULT
    known = recipe_names()
    is_recipe = source in known or any(name.endswith(f"/{source}") for name in known)
    recipe = find(source, folder=folder).recipe if source in names(folder) and not is_recipe else source
    return JobFile(name=source, base={}, recipe=recipe, overrides=())


def _task_in(path: Path) -> JobFile | None:
    """Return the task in a file; None if it is a recipe or unreadable. The recipe reader then reports the error."""
    try:
        return _of_task(path) if "run" in (_documents(path) or [{}])[-1] else None
    except (OSError, yaml.YAMLError):
        return None


def _of_task(path: Path) -> JobFile:
    documents = [document for document in _documents(path) if set(document) - {"name", "execution"}]
    if len(documents) != 1:
        raise UserError(
            f"{path.name} is a pipeline of {len(documents)} tasks; submit takes one at a time",
            hint=f"sky jobs launch {path} --env CHECKPOINTS=…",
        )
    base = documents[0]
    envs = base.get("envs") or {}
    if not envs.get("RECIPE"):
        raise UserError(f"{path} names no recipe", hint="add `envs: {RECIPE: …}`, as in jobs/dpo_full.yaml")
    words = str(envs.get("OVERRIDES") or "").split()
    return JobFile(path.stem, base, str(envs["RECIPE"]), tuple(words), _gpus(base.get("resources") or {}))


def _gpus(resources: dict[str, Any]) -> str | None:
    entries = [resources, *(resources.get("ordered") or resources.get("any_of") or ())]
    named = {str(entry["accelerators"]) for entry in entries if entry.get("accelerators")}
    return named.pop() if len(named) == 1 else None


def _documents(path: Path) -> list[dict[str, Any]]:
    loaded = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return [document for document in loaded if isinstance(document, dict)]

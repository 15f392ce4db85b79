"""`submit --resume RUN`: what a run trains, from its bucket; where it ran, from this machine's memory of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from launcher import settings
from launcher.registry import known
from launcher.registry.known import Known, Local
from launcher.runs.limits import current_limits
from launcher.runs.run import Reader
from trainer.bucket import open_run
from trainer.bucket.address import canonical
from trainer.bucket.layout import RUN_KEY
from trainer.errors import UserError
from trainer.recipe import Recipe, load

FOLDER = "resumed"
LIMITS = {"budget": "budget_usd", "deadline": "deadline_h"}
"""Options, and what a run's events call them."""


class Resumed(NamedTuple):
    """A submission that goes on with a run."""

    recipe: str
    """A file, made of what the run's bucket says."""
    options: dict[str, Any]


def resume(run_id: str, options: Mapping[str, Any], *, state: Path, environ: Mapping[str, str]) -> Resumed:
    """The run's own recipe, bucket, place and limits, with what the user now wants otherwise.

    Args:
        run_id: the run's name in its bucket.
        options: those of `submit`; what is given goes before what is known.
        state: this machine's.
        environ: settings and their overrides.

    Raises:
        UserError: no such run, several, or one whose recipe this version reads otherwise.
    """
    known = _known(run_id, options["checkpoints"], state)
    checkpoints = options["checkpoints"] or (
        known.record.checkpoints if known else settings.load(environ).checkpoints
    )
    address = canonical(checkpoints, Path.cwd())
    bucket = open_run(address, run_id)
    data = bucket.get_or_none(RUN_KEY)
    if data is None:
        raise UserError(
            f"no run {run_id} in {address}",
            hint="name its bucket with `--checkpoints`; a run that never began is submitted by its recipe",
        )
    limits = current_limits(Reader(bucket, run_id).read())
    before = {option: getattr(limits, key) for option, key in LIMITS.items()}
    there = {**before, **_place(known, options), "checkpoints": address, "name": run_id}
    mounts = {} if known is None or isinstance(known, Local) else known.record.mounts
    recipe = _recipe_file(json.loads(data), run_id, state, mounts)
    return Resumed(str(recipe), {**options, **{key: options[key] or value for key, value in there.items()}})


def _known(run_id: str, checkpoints: str | None, state: Path) -> Known | None:
    here = [each for each in known.known(state) if each.record.run_id == run_id]
    if not here:
        return None
    if checkpoints is None:
        return known.find(state, run_id, None)
    address = canonical(checkpoints, Path.cwd())
    return next((each for each in here if each.record.checkpoints == address), None)


def _place(known: Known | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where it ran, unless the user names another place."""
    if known is None or options["infra"]:
        return {}
    if isinstance(known, Local):
        return {} if options["gpus"] else {"infra": ("local",)}
    asked = {name: value for name, value in known.record.options.items() if name in options}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}


def _recipe_file(record: Mapping[str, Any], run_id: str, state: Path, mounts: Mapping[str, str]) -> Path:
    """The recipe of `run.json` as a file under its own name, which finds it its task again."""
    recipe = _as_here(Recipe.model_validate(record["recipe"]), mounts)
    folder, _, stem = recipe.name.rpartition("/")
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", word) or "-" for word in (run_id, folder or "recipe", stem)]
    path = state / FOLDER / words[0] / words[1] / f"{words[2]}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(yaml.safe_dump(recipe.as_flat(), sort_keys=False))
    read = load(path).recipe
    if read.digest() != record["recipe_digest"]:
        raise UserError(
            f"run {run_id} is of a recipe that this version reads otherwise: {'; '.join(recipe.differences(read))}",
            hint="submit the recipe that it was started with, with `--name` and the higher limit",
        )
    return path


def _as_here(recipe: Recipe, mounts: Mapping[str, str]) -> Recipe:
    """With data files that were copied to the nodes where they lie on this machine."""
    here = {there.removeprefix("~"): path for there, path in mounts.items()}
    return recipe.with_data(lambda name: next((here[end] for end in here if name.endswith(end)), name))

"""`submit --resume RUN`: the recipe and limits come from the run's bucket, the place from this machine's records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from launcher import settings
from launcher.registry.find import find_or_none
from launcher.registry.submitted import StartedRun
from launcher.runs.limits import current_limits
from launcher.runs.run import Reader
from trainer.bucket import open_run
from trainer.bucket.address import canonical
from trainer.bucket.layout import RUN_KEY
from trainer.errors import UserError
from trainer.recipe import Recipe, load

FOLDER = "resumed"
LIMITS = {"budget": "budget_usd", "deadline": "deadline_h"}
"""Options and their names in a run's events."""


class Resumed(NamedTuple):
    """The arguments of `submit` that continue a run."""

    recipe: str
    """A recipe file, written from the run's bucket."""
    options: dict[str, Any]


def resume(run_id: str, options: Mapping[str, Any], *, state: Path, environ: Mapping[str, str]) -> Resumed:
    """Return the run's own recipe, bucket, place and limits, overridden by the given options.

    Args:
        run_id: the run's name in its bucket.
        options: the options of `submit`, as typed.
        state: folder with this machine's records.
        environ: for the settings.

    Raises:
        UserError: there is no such run, there are several, or this version reads its recipe differently.
    """
    given = canonical(options["checkpoints"], Path.cwd()) if options["checkpoints"] else None
    record = find_or_none(state, run_id, given)
    known = record.checkpoints if record else settings.load(environ).checkpoints
    address = given or canonical(known, Path.cwd())
    bucket = open_run(address, run_id)
    data = bucket.get_or_none(RUN_KEY)
    if data is None:
        raise UserError(
            f"no run {run_id} in {address}",
            hint="name its bucket with `--checkpoints`; a run that never began is submitted by its recipe",
        )
    limits = current_limits(Reader(bucket, run_id).read())
    before = {option: getattr(limits, key) for option, key in LIMITS.items()}
    earlier = {**before, **_place(record, options), "checkpoints": address, "name": run_id}
    recipe = _recipe_file(json.loads(data), run_id, state, record.mounts if record else {})
    merged = {**options, **{key: options[key] or value for key, value in earlier.items()}}
    return Resumed(str(recipe), merged)


def _place(record: StartedRun | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the place where the run was, unless the user names another place."""
    if record is None or options["infra"]:
        return {}
    if record.kind == "local":
        return {} if options["gpus"] else {"infra": ("local",)}
    asked = {name: value for name, value in record.options.items() if name in options}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}


def _recipe_file(record: Mapping[str, Any], run_id: str, state: Path, mounts: Mapping[str, str]) -> Path:
    """Write the recipe of `run.json` to a file. The recipe keeps its name, because the name decides which task is used."""
    recipe = _as_here(Recipe.model_validate(record["recipe"]), mounts)
    folder, _, stem = recipe.name.rpartition("/")
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", word) or "-" for word in (run_id, folder or "recipe", stem)]
    path = state / FOLDER / words[0] / words[1] / f"{words[2]}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(yaml.safe_dump(recipe.as_flat(), sort_keys=False))
    read = load(path).recipe
    if read.digest() != record["recipe_digest"]:
        raise UserError(
            f"this version reads the recipe of run {run_id} differently: {'; '.join(recipe.differences(read))}",
            hint="submit the original recipe with `--name` and the higher limit",
        )
    return path


def _as_here(recipe: Recipe, mounts: Mapping[str, str]) -> Recipe:
    """Replace the paths of data files that were copied to the nodes by their paths on this machine."""
    here = {there.removeprefix("~"): path for there, path in mounts.items()}
    return recipe.with_data(lambda name: next((here[end] for end in here if name.endswith(end)), name))

"""What nodes elsewhere get from this machine: the code, the recipe's file, secrets; what they cannot reach is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from trainer.bucket.address import folder_of
from trainer.errors import BucketError, UserError
from trainer.recipe import Recipe
from trainer.recipe import names as recipe_names

THERE = "~/.aeolus"
"""Where a node has what is copied to it beside the checkout."""
ODD = re.compile(r"[^\w.+=@-]+", re.ASCII)
"""What SkyPilot's shell on the node would take apart: it makes a copy's folder without quotes."""
ROOT = Path(__file__).resolve().parents[2]
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
OF_S3 = ("AWS_REGION", "AWS_DEFAULT_REGION", *ENDPOINTS)
"""What the trainer's client of S3 reads beside the keys, which the tasks name themselves."""


def reachable(checkpoints: str, environ: Mapping[str, str], infra: Sequence[str], *, own: bool) -> str:
    """The bucket's address, if nodes elsewhere can have it."""
    where = ", ".join(infra)
    if folder_of(checkpoints) is not None:
        raise BucketError(
            f"checkpoints would go to {checkpoints}, a folder of this machine, which {where} cannot reach",
            hint='`--checkpoints gs://BUCKET/runs`, or `checkpoints = "gs://BUCKET/runs"` in the settings',
        )
    endpoint = next((environ[name] for name in ENDPOINTS if environ.get(name)), "")
    local = urlsplit(endpoint).hostname in ("localhost", "127.0.0.1", "::1")
    if checkpoints.startswith("s3://") and local and not own:
        raise BucketError(
            f"{checkpoints} is at {endpoint}, on this machine, which {where} cannot reach",
            hint="unset AWS_ENDPOINT_URL for Amazon's own, or name a server that the nodes can reach",
        )
    return checkpoints


def refuse_local_model(recipe: Recipe) -> None:
    """A model's folder is too much to copy at every recovery."""
    name = recipe.model_name_or_path
    if name and Path(name).is_absolute():
        raise UserError(
            f"{name} is on this machine only, and a rented one cannot start from it",
            hint="put it on the Hub, where a private repository will do; or name another run's: s3://BUCKET/runs/RUN/final",
        )


def data_there(recipe: Recipe) -> tuple[tuple[str, ...], dict[str, str]]:
    """Overrides that name the recipe's data files of this machine as the node finds them, and what is copied there.

    They keep their names, by which a run knows its data.

    Raises:
        UserError: a name that the way to the node would change.
    """
    mixture = recipe.dataset_mixture
    listed = {"datasets": mixture.datasets, "test_datasets": mixture.test_datasets}
    places = {f"{key}.{nth}": each.id for key, sources in listed.items() for nth, each in enumerate(sources)}
    here = {place: name for place, name in places.items() if Path(name).is_absolute()}
    if odd := next((name for name in here.values() if ODD.search(Path(name).name)), None):
        raise UserError(
            f"{odd} has a name that the way to the node would change",
            hint="name it with letters, digits and `._-`",
        )
    copied = {
        name: f"{THERE}/data/{nth}/{Path(name).name}" for nth, name in enumerate(dict.fromkeys(here.values()))
    }
    overrides = tuple(f"dataset_mixture.{place}.id={copied[name]}" for place, name in here.items())
    return overrides, {there: name for name, there in copied.items()}


def recipe_there(recipe: str) -> tuple[str, dict[str, str]]:
    """What the node calls the recipe, and what has to be copied there for it; its folder is part of its name."""
    path = Path(recipe).expanduser()
    if recipe in recipe_names() or not path.is_file():
        return recipe, {}
    folder, name = (ODD.sub("-", word) for word in (path.resolve().parent.name, path.name))
    there = f"{THERE}/{folder}/{name}"
    return there, {there: str(path.resolve())}


def secrets(base: Mapping[str, object], checkpoints: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Of the variables that the task names as secrets those that are set here; Amazon's only for its buckets."""
    named = base.get("secrets") or {}
    s3 = checkpoints.startswith("s3://")
    names = dict.fromkeys([*(str(name) for name in named), *(OF_S3 if s3 else ())])  # type: ignore[attr-defined]
    return {
        name: environ[name] for name in names if environ.get(name) and (s3 or not name.startswith("AWS_"))
    }


def workdir(image: str | None) -> str | None:
    """The checkout, which SkyPilot copies but for what git ignores; an image has the code."""
    if (ROOT / "pyproject.toml").is_file():
        return str(ROOT)
    if image:
        return None
    raise UserError(
        f"{ROOT} is no checkout of the repository, so there is nothing to copy to the nodes",
        hint="run from one, or name an image that has the trainer: `--image`",
    )

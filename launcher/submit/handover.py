"""What nodes elsewhere get from this machine: the code, the recipe's file, secrets; what they cannot reach is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from launcher.runs.read import folder_of
from trainer.errors import BucketError, UserError
from trainer.recipe import Recipe
from trainer.recipe import names as recipe_names

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


def refuse_local_files(recipe: Recipe, *, rented: bool) -> None:
    mixture = recipe.dataset_mixture
    ids = [recipe.model_name_or_path, *(each.id for each in (*mixture.datasets, *mixture.test_datasets))]
    local = [name for name in ids if name and Path(name).is_absolute()]
    if local and rented:
        raise UserError(
            f"{', '.join(local)} is on this machine only",
            hint="put data on the Hub, and a model there or into a bucket: s3://BUCKET/runs/RUN/final",
        )


def recipe_there(recipe: str) -> tuple[str, dict[str, str]]:
    """What the node calls the recipe, and what has to be copied there for it; its folder is part of its name."""
    path = Path(recipe).expanduser()
    if recipe in recipe_names() or not path.is_file():
        return recipe, {}
    there = f"~/.aeolus/{path.resolve().parent.name}/{path.name}"
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

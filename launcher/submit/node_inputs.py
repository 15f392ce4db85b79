"""What a node receives from this machine: code, recipe, data, secrets, image, prices. What it cannot reach is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from launcher.image import builders
from launcher.image.builders import BuildOptions
from launcher.image.spec import host_of
from launcher.plan.rank import PlanRow
from launcher.prices.offer import Offer
from launcher.settings import Settings
from launcher.submit.task import Candidate
from trainer.accounting import Limits
from trainer.bucket.address import folder_of
from trainer.errors import BucketError, UserError
from trainer.options import BUDGET_USD, DEADLINE_H, PLAN, PRICES, USD_PER_H
from trainer.recipe import Recipe
from trainer.recipe import names as recipe_names

NODE_FOLDER = "~/.aeolus"
"""Folder on a node for the files that are copied there in addition to the checkout."""
UNSAFE = re.compile(r"[^\w.+=@-]+", re.ASCII)
"""Characters that a copied path must not have: SkyPilot makes a copy's folder without quoting its name."""
ROOT = Path(__file__).resolve().parents[2]
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
S3_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION", *ENDPOINTS)
"""Variables that the trainer's S3 client reads besides the keys; the tasks themselves name the keys."""
AUTO_IMAGE = "auto"
USERNAME, PASSWORD, SERVER = "SKYPILOT_DOCKER_USERNAME", "SKYPILOT_DOCKER_PASSWORD", "SKYPILOT_DOCKER_SERVER"
"""SkyPilot's variables for the login to a private registry:
https://docs.skypilot.co/en/v0.14.1/examples/docker-containers.html#private-registries"""


class Container(NamedTuple):
    """The image of a submission's machines."""

    image: str | None = None
    """None: the machine's own system, on which the pinned packages are installed."""
    build: BuildOptions | None = None
    """Options to build and push the image with, unless the registry already has it."""


def reachable_bucket(checkpoints: str, environ: Mapping[str, str], infra: Sequence[str], *, own: bool) -> str:
    """Return the bucket's address if nodes elsewhere can reach it.

    Args:
        checkpoints: canonical address of the folder of runs.
        environ: names the S3 server, if it is not Amazon's.
        infra: where the nodes are.
        own: whether the nodes are the user's own; those may reach an S3 server on this machine.

    Raises:
        BucketError: it is a folder of this machine, or on an S3 server of this machine.
    """
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
    """Refuse a model folder of this machine: it is too large to copy at every recovery."""
    name = recipe.model_name_or_path
    if name and Path(name).is_absolute():
        raise UserError(
            f"{name} is on this machine only, and a rented one cannot start from it",
            hint="upload it to the Hub (a private repository is fine), or name another run's model: "
            "s3://BUCKET/runs/RUN/final",
        )


def copied_data(recipe: Recipe) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return overrides that name the recipe's local data files by their path on the node, and the files to copy.

    A file keeps its name, because the run's digest includes it.

    Raises:
        UserError: a file name has characters that would not arrive unchanged.
    """
    mixture = recipe.dataset_mixture
    listed = {"datasets": mixture.datasets, "test_datasets": mixture.test_datasets}
    sources = {f"{key}.{nth}": source.id for key, group in listed.items() for nth, source in enumerate(group)}
    local = {key: name for key, name in sources.items() if Path(name).is_absolute()}
    if unsafe := next((name for name in local.values() if UNSAFE.search(Path(name).name)), None):
        raise UserError(
            f"{unsafe}: this file name cannot be passed to a node unchanged",
            hint="name it with letters, digits and `._-`",
        )
    copies = {
        name: f"{NODE_FOLDER}/data/{nth}/{Path(name).name}"
        for nth, name in enumerate(dict.fromkeys(local.values()))
    }
    overrides = tuple(f"dataset_mixture.{key}.id={copies[name]}" for key, name in local.items())
    return overrides, {on_node: name for name, on_node in copies.items()}


def copied_recipe(recipe: str) -> tuple[str, dict[str, str]]:
    """Return the recipe's name on the node and the files to copy for it. Its folder is part of its name."""
    path = Path(recipe).expanduser()
    if recipe in recipe_names() or not path.is_file():
        return recipe, {}
    folder, name = (UNSAFE.sub("-", word) for word in (path.resolve().parent.name, path.name))
    on_node = f"{NODE_FOLDER}/{folder}/{name}"
    return on_node, {on_node: str(path.resolve())}


def secrets(base: Mapping[str, object], checkpoints: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets that the task names and that are set here. Amazon's are included for S3 buckets only."""
    named = base.get("secrets") or {}
    s3 = checkpoints.startswith("s3://")
    names = dict.fromkeys([*(str(name) for name in named), *(S3_VARIABLES if s3 else ())])  # type: ignore[attr-defined]
    return {
        name: environ[name] for name in names if environ.get(name) and (s3 or not name.startswith("AWS_"))
    }


def workdir(image: str | None) -> str | None:
    """Return the checkout, which SkyPilot copies without the files that git ignores; an image needs no copy."""
    if (ROOT / "pyproject.toml").is_file():
        return str(ROOT)
    if image:
        return None
    raise UserError(
        f"{ROOT} is not a checkout of the repository, so there is no code to copy to the nodes",
        hint="run from a checkout, or name an image that has the trainer: `--image`",
    )


def container(wanted: str | None, site: Settings, *, own: bool) -> Container:
    """Return the image of a submission.

    Args:
        wanted: the option `--image`.
        site: the settings. Their image is for rented machines only.
        own: whether the machines are the user's own.

    Raises:
        UserError: an image must be built, but no registry is named, or this machine cannot build it.
    """
    named = wanted or (None if own else site.image)
    if named != AUTO_IMAGE:
        return Container(named)
    options = BuildOptions(registry=site.registry, push=True)
    return Container(builders.image_name(options), options)


def login(image: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets with which a machine pulls the image; none if the environment has none.

    Raises:
        UserError: a user name without a password, or a password without a user name.
    """
    given = {name: environ[name] for name in (USERNAME, PASSWORD, SERVER) if environ.get(name)}
    if not image or not given:
        return {}
    if missing := [name for name in (USERNAME, PASSWORD) if name not in given]:
        raise UserError(
            f"{' and '.join(given)} without {' and '.join(missing)}: a registry's login needs both",
            hint="set both, or neither for a public image",
        )
    return {SERVER: host_of(image.removeprefix("docker:")), **given}


def price_variables(
    row: PlanRow, candidates: Sequence[Candidate], offers: Iterable[Offer], *, nodes: int
) -> dict[str, str]:
    """Return the variables from which the trainer learns its price. They have a price for each place where it may start."""
    return {
        PRICES: _json(list(_prices(candidates, offers, nodes=nodes))),
        PLAN: _json(_promised(row)),
    }


def own_price(usd_per_h: float | None) -> dict[str, str]:
    """Return the price variable of a machine that is not rented."""
    return {} if usd_per_h is None else {USD_PER_H: f"{usd_per_h:g}"}


def limit_variables(limits: Limits) -> dict[str, str]:
    """Return the limits that the run's supervisor enforces."""
    values = {BUDGET_USD: limits.budget_usd, DEADLINE_H: limits.deadline_h}
    return {name: f"{value:.10g}" for name, value in values.items() if value is not None}


def _prices(
    candidates: Sequence[Candidate], offers: Iterable[Offer], *, nodes: int
) -> Iterator[Mapping[str, Any]]:
    """Yield an entry for each region that a candidate may start in, with the price of all nodes.

    A candidate names a cloud, whose regions SkyPilot tries one after the other. Their prices differ.
    """
    for offer in offers:
        gpus = f"{offer.shape.accelerator}:{offer.shape.count}"
        for market, spot, usd_per_h in (
            ("spot", True, offer.spot_usd_per_h),
            ("on demand", False, offer.usd_per_h),
        ):
            wanted = any(
                candidate.accelerators == gpus
                and candidate.use_spot is spot
                and candidate.instance_type in (None, offer.instance_type)
                and candidate.infra in (offer.infra, f"{offer.infra}/{offer.region}")
                for candidate in candidates
            )
            if wanted and usd_per_h is not None:
                yield {
                    "infra": f"{offer.infra}/{offer.region}",
                    "gpus": gpus,
                    "market": market,
                    "usd_per_h": round(usd_per_h * nodes, 6),
                    "instance_type": offer.instance_type,
                }


def _promised(row: PlanRow) -> Mapping[str, Any]:
    """Return the plan's predictions for the chosen row. A report later compares them with the measured numbers."""
    return {
        "hours": round(row.hours, 4),
        "usd": round(row.usd, 4),
        "usd_per_h": round(row.usd_per_h, 6),
        "market": "spot" if row.spot else "on demand",
        "infra": f"{row.offer.infra}/{row.offer.region}",
        "gpus": f"{row.shape.accelerator}:{row.shape.count}",
        "nodes": row.shape.nodes,
        "gpu_gib": round(row.fit.gpu.gib, 2),
        "host_gib": round(row.fit.host.gib, 2),
        "step_s": round(row.estimate.step_s, 4),
        "steps": row.estimate.steps,
        "tokens_per_s": round(row.estimate.tokens_per_s, 1),
        "preemptions": round(row.expectation.preemptions, 3) if row.expectation else 0.0,
    }


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))

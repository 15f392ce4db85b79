"""The price of this machine and the promises of the plan, read from the task's environment.

The launcher writes $AEOLUS_PRICES, $AEOLUS_PLAN and $AEOLUS_USD_PER_H. SkyPilot 0.14.1 sets $SKYPILOT_CLUSTER_INFO for
`setup` and for `run`, on every machine that it has newly provisioned:
`{"cluster_name": …, "cloud": "GCP", "region": "us-central1", "zone": …}` (`sky/backends/cloud_vm_ray_backend.py`,
`_skypilot_predefined_env_vars`). SkyPilot provides neither the market (spot or on demand) nor a price.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from trainer.events import Event, of_kind
from trainer.hardware import Shape
from trainer.options import PLAN, PRICES, USD_PER_H
from trainer.supervisor.preemption import query_metadata

log = logging.getLogger(__name__)
CLUSTER = "SKYPILOT_CLUSTER_INFO"
OWN = frozenset({"kubernetes", "slurm", "ssh", "vsphere"})
"""SkyPilot's names for places where users have machines of their own."""
CONTAINERS = frozenset({"runpod", "vast"})
"""Clouds that rent out containers. Their hosts boot for other customers too."""
MAX_BOOT_S = 3600.0
"""Longest time from boot to claim. A machine that has been up for longer was used for something else before."""
SAME_BOOT_S = 5.0
"""Two readings of one boot time differ by less. The kernel derives it from a clock that may be set in between."""
Market = Literal["spot", "on demand"]
QueryMetadata = Callable[[str], str | None]
"""Returns the value of a key of Google's metadata server, or None."""


class Price(BaseModel):
    """The price of all nodes of an attempt together. Unknown fields are None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    usd_per_h: float | None = None
    market: Market | None = None
    cloud: str | None = None
    region: str | None = None


class ListedPrice(BaseModel):
    """An entry of $AEOLUS_PRICES: the price of one of the plan's machines in one region."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    infra: str
    """`gcp/us-central1`."""
    gpus: str
    """The GPUs of one node: `A100-80GB:8`."""
    market: Market
    usd_per_h: float
    """The price of all nodes together."""
    instance_type: str | None = None


LISTING = TypeAdapter(tuple[ListedPrice, ...])


def detect_price(
    shape: Shape, *, environ: Mapping[str, str] = os.environ, query: QueryMetadata | None = None
) -> Price:
    """Return the price of this machine, with its cloud, region and market.

    $AEOLUS_USD_PER_H takes precedence over the listed prices. If the market or the instance type is unknown, the
    highest possible price is returned, so that a budget stops the run too early rather than too late.

    Args:
        shape: this machine.
        environ: the task's environment.
        query: replaces the request to GCE's metadata server, which is sent on GCE only.
    """
    cloud, region = _place(environ)
    on_gce = cloud == "gcp"
    ask = (query or (lambda key: query_metadata(key, environ=environ))) if on_gce else (lambda _key: None)
    market = _market(ask("instance/scheduling/preemptible"))
    if (own := _own_price(environ)) is not None:
        return Price(usd_per_h=own, market=market, cloud=cloud, region=region)
    gpus = f"{shape.accelerator}:{shape.count}".casefold()
    place = f"{cloud}/{region}".casefold()
    matches = [
        listed
        for listed in _listed(environ)
        if listed.infra.casefold() == place
        and listed.gpus.casefold() == gpus
        and market in (None, listed.market)
    ]
    # Some GPUs are rented with several hosts at different prices, which only the instance type tells apart.
    if on_gce and len({listed.instance_type for listed in matches}) > 1:
        instance_type = (ask("instance/machine-type") or "").rpartition("/")[2]
        matches = [listed for listed in matches if listed.instance_type == instance_type] or matches
    markets = {listed.market for listed in matches}
    return Price(
        usd_per_h=max((listed.usd_per_h for listed in matches), default=None),
        market=market or (markets.pop() if len(markets) == 1 else None),
        cloud=cloud,
        region=region,
    )


def is_rented(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether SkyPilot rented this machine, so that it is paid for from its boot on."""
    cloud, _ = _place(environ)
    return cloud not in {None, *OWN, *CONTAINERS} and not environ.get(USD_PER_H)


def read_plan(environ: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Return what `plan` promised for this run, unchanged. None if the run was not planned."""
    plan = _json(environ, PLAN)
    return plan if isinstance(plan, dict) else None


def paid_boot_time(
    node: str,
    earlier: Callable[[], Sequence[Sequence[Event]]],
    *,
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
) -> str | None:
    """Return when this machine booted (UTC, ISO 8601) if this attempt pays for the time since then.

    The first attempt of a run on a rented machine pays for it. Other attempts get None.

    Args:
        node: this machine's name.
        earlier: returns the events of each earlier attempt. It is called only if they are needed.
        environ: the task's environment.
        now: Unix time in seconds.
    """
    if not is_rented(environ):
        return None
    booted_at = psutil.boot_time()
    if not 0 < now() - booted_at <= MAX_BOOT_S:
        return None
    if any(_pays_for_boot(claimed, node, booted_at) for claimed in _claims(earlier())):
        return None
    return datetime.fromtimestamp(booted_at, UTC).isoformat()


def _claims(attempts: Sequence[Sequence[Event]]) -> list[Event]:
    return [claimed for events in attempts for claimed in of_kind(events, "claimed")]


def _pays_for_boot(claimed: Event, node: str, booted_at: float) -> bool:
    """Return whether an earlier attempt on the same machine already pays for the same boot."""
    if not claimed.get("booted") or claimed["shape"]["node"] != node:
        return False
    return abs(datetime.fromisoformat(claimed["booted"]).timestamp() - booted_at) <= SAME_BOOT_S


def _place(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the cloud and the region of this machine."""
    cluster = _json(environ, CLUSTER)
    if not isinstance(cluster, dict):
        return None, None
    cloud, region = cluster.get("cloud"), cluster.get("region")
    return (str(cloud).lower() if cloud else None), (str(region) if region else None)


def _market(preemptible: str | None) -> Market | None:
    markets: dict[str | None, Market] = {"TRUE": "spot", "FALSE": "on demand"}
    return markets.get(preemptible)


def _own_price(environ: Mapping[str, str]) -> float | None:
    text = environ.get(USD_PER_H)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value >= 0:
        return value
    log.warning("$%s=%r is ignored: it is not a price in dollars per hour", USD_PER_H, text)
    return None


def _listed(environ: Mapping[str, str]) -> tuple[ListedPrice, ...]:
    if not environ.get(PRICES):
        return ()
    try:
        return LISTING.validate_json(environ[PRICES])
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        log.warning("$%s cannot be read, so the price of this machine is unknown: %s", PRICES, message)
        return ()


def _json(environ: Mapping[str, str], name: str) -> Any:
    text = environ.get(name)
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        log.warning("$%s is ignored: it is not valid JSON", name)
        return None

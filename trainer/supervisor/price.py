"""What this node costs, and what the plan promised: from what the launcher wrote into the task's environment.

SkyPilot 0.14.1 sets $SKYPILOT_CLUSTER_INFO for `setup` and for `run`, on every machine that it has provisioned anew:
`{"cluster_name": …, "cloud": "GCP", "region": "us-central1", "zone": …}` (`sky/backends/cloud_vm_ray_backend.py`,
`_skypilot_predefined_env_vars`). It tells neither the market nor a price.
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
from trainer.supervisor.preemption import look_up
from trainer.task_variables import PLAN, PRICES, USD_PER_H

log = logging.getLogger(__name__)
CLUSTER = "SKYPILOT_CLUSTER_INFO"
OWN = frozenset({"kubernetes", "slurm", "ssh", "vsphere"})
"""Where machines of one's own are."""
CONTAINERS = frozenset({"runpod", "vast"})
"""Clouds that rent containers: what boots there is a host that others pay for too."""
Market = Literal["spot", "on demand"]
LookUp = Callable[[str], str | None]
"""A key of Google's metadata server to its value; None where there is none."""


class Price(BaseModel):
    """What an attempt's machines cost, all nodes together; None for what nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    usd_per_h: float | None = None
    market: Market | None = None
    cloud: str | None = None
    region: str | None = None


class ListedPrice(BaseModel):
    """An entry of $AEOLUS_PRICES: what one of the plan's machines costs in one region."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    infra: str
    """`gcp/us-central1`."""
    gpus: str
    """Of one node: `A100-80GB:8`."""
    market: Market
    usd_per_h: float
    """Of all nodes."""
    instance_type: str | None = None


LISTING = TypeAdapter(tuple[ListedPrice, ...])


def price_here(shape: Shape, *, environ: Mapping[str, str] = os.environ, look: LookUp | None = None) -> Price:
    """The price of this machine, with where it stands and its market; asks GCE's metadata server, on GCE alone.

    A machine of one's own costs what $AEOLUS_USD_PER_H says, which goes before everything else. Where the market or the
    instance type remains open, the dearest that is possible: a budget is then kept too soon, never too late.
    """
    cloud, region = _place(environ)
    on_gce = cloud == "gcp"
    ask = (look or (lambda key: look_up(key, environ=environ))) if on_gce else (lambda _key: None)
    market = _market(ask("instance/scheduling/preemptible"))
    if (own := _own(environ)) is not None:
        return Price(usd_per_h=own, market=market, cloud=cloud, region=region)
    gpus = f"{shape.accelerator}:{shape.count}".casefold()
    here = [
        each
        for each in _listed(environ)
        if each.infra.casefold() == f"{cloud}/{region}".casefold() and each.gpus.casefold() == gpus
    ]
    here = [each for each in here if market in (None, each.market)]
    if on_gce and len({each.instance_type for each in here}) > 1:
        kind = (ask("instance/machine-type") or "").rpartition("/")[2]
        here = [each for each in here if each.instance_type == kind] or here
    markets = {each.market for each in here}
    return Price(
        usd_per_h=max((each.usd_per_h for each in here), default=None),
        market=market or (markets.pop() if len(markets) == 1 else None),
        cloud=cloud,
        region=region,
    )


def rented(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SkyPilot rented this machine, so that somebody pays for it from its boot on."""
    cloud, _ = _place(environ)
    return cloud not in {None, *OWN, *CONTAINERS} and not environ.get(USD_PER_H)


def plan_here(environ: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """What `plan` promised of this run, as it came; None where nobody planned."""
    told = _json(environ, PLAN)
    return told if isinstance(told, dict) else None


def _place(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    told = _json(environ, CLUSTER)
    if not isinstance(told, dict):
        return None, None
    cloud, region = told.get("cloud"), told.get("region")
    return (str(cloud).lower() if cloud else None), (str(region) if region else None)


def _market(preemptible: str | None) -> Market | None:
    markets: dict[str | None, Market] = {"TRUE": "spot", "FALSE": "on demand"}
    return markets.get(preemptible)


def _own(environ: Mapping[str, str]) -> float | None:
    text = environ.get(USD_PER_H)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value >= 0:
        return value
    log.warning("$%s is no price in dollars an hour, and counts as none: %r", USD_PER_H, text)
    return None


def _listed(environ: Mapping[str, str]) -> tuple[ListedPrice, ...]:
    if not environ.get(PRICES):
        return ()
    try:
        return LISTING.validate_json(environ[PRICES])
    except ValidationError as error:
        log.warning("$%s cannot be read, and this machine has no price: %s", PRICES, error.errors()[0]["msg"])
        return ()


def _json(environ: Mapping[str, str], name: str) -> Any:
    text = environ.get(name)
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        log.warning("$%s is no JSON, and counts as not there", name)
        return None


LONGEST_S = 3600.0
"""Between boot and claim; a machine that has been up for longer did something else before."""
SAME_S = 5.0
"""Two readings of one boot differ by less: the kernel takes it from a clock that is set meanwhile."""


def booted_here(
    node: str,
    earlier: Callable[[], Sequence[Sequence[Event]]],
    *,
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
) -> str | None:
    """When this machine booted (UTC, ISO 8601), if this attempt is the first of its run to pay for that.

    Args:
        node: this machine's name.
        earlier: the events of each earlier attempt; asked for only where they matter.
        environ: of this process.
        now: unix time, seconds.
    """
    if not rented(environ):
        return None
    at = psutil.boot_time()
    if not 0 < now() - at <= LONGEST_S or any(_paid(claimed, node, at) for claimed in _claims(earlier())):
        return None
    return datetime.fromtimestamp(at, UTC).isoformat()


def _claims(attempts: Sequence[Sequence[Event]]) -> list[Event]:
    return [claimed for events in attempts for claimed in of_kind(events, "claimed")]


def _paid(claimed: Event, node: str, at: float) -> bool:
    """Whether an earlier attempt was claimed on the same machine since the same boot, and pays for it."""
    if not claimed.get("booted") or claimed["shape"]["node"] != node:
        return False
    return abs(datetime.fromisoformat(claimed["booted"]).timestamp() - at) <= SAME_S

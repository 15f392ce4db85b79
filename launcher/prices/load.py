"""Load the prices of machines with GPUs: from the cache, from SkyPilot's catalog, or from the shipped snapshot."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from launcher.cloud import skypilot
from launcher.cloud.skypilot import Fetched
from launcher.prices import store
from launcher.prices.offer import Offer, Prices, offer_of
from launcher.prices.store import Table
from trainer.errors import Unavailable, UserError

__all__ = ["DEFAULT_INFRA", "Catalogs", "FakeCatalogs", "Offer", "Prices", "load_prices"]

DEFAULT_INFRA = ("gcp", "lambda")
OWN = (*skypilot.UNPRICED, "local")
"""Machines that the user owns. They have no rental price, so no plan covers them."""
ALIASES = {"k8s": "kubernetes"}
"""SkyPilot's short names."""

Source = Literal["skypilot", "cache", "snapshot"]
FRESHEST_FIRST: tuple[Source, ...] = ("skypilot", "cache", "snapshot")
NAMES = {"cache": "cache", "snapshot": "shipped snapshot"}
Catalogs = Callable[[Sequence[str]], Mapping[str, Fetched | UserError]]
"""The type of `launcher.cloud.skypilot.catalogs` and of `FakeCatalogs`."""


class _CloudPrices(NamedTuple):
    """A cloud's prices, their source, and notes for the user about that source."""

    table: Table
    source: Source
    notes: tuple[str, ...] = ()


class FakeCatalogs:
    """A stand-in for SkyPilot's catalogs, for tests and for planning without SkyPilot.

    It returns the given answers, and `Unavailable` for every other cloud. `asked` records every request.
    """

    def __init__(self, answers: Mapping[str, Fetched | UserError] | None = None) -> None:
        self.answers = dict(answers or {})
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, infras: Sequence[str]) -> Mapping[str, Fetched | UserError]:
        self.asked.append(tuple(infras))
        return {infra: self.answers.get(infra, Unavailable("the network is down")) for infra in infras}


def load_prices(
    *,
    now: datetime,
    infra: Sequence[str] = DEFAULT_INFRA,
    folder: Path | None = None,
    catalogs: Catalogs = skypilot.catalogs,
    refresh: bool = False,
) -> Prices:
    """Return the prices of machines with GPUs.

    Each cloud's prices come from the cache if it is younger than `store.MAX_AGE`, else from SkyPilot's catalog,
    else from the cache or the snapshot, whichever is newer. A failed request is not repeated within
    `store.RETRY_INTERVAL`. SkyPilot is imported only when it is asked.

    Args:
        now: the current time, with a time zone.
        infra: clouds or regions as SkyPilot writes them, `gcp` or `gcp/us-central1`.
        folder: the cache folder; None means the user's.
        catalogs: asks SkyPilot for catalogs.
        refresh: ask SkyPilot even if the cache is fresh or the last request has just failed.

    Raises:
        UserError: an unknown cloud or region, or a cloud whose prices no source has.
    """
    places = [_parse_place(name) for name in infra]
    clouds = list(dict.fromkeys(cloud for cloud, _ in places if cloud not in OWN))
    found = _find(clouds, now=now, folder=folder or store.cache_folder(), catalogs=catalogs, refresh=refresh)
    offers = [
        offer for cloud, region in places if cloud in found for offer in _offers(found[cloud].table, region)
    ]
    owned = [f"{cloud} has no prices: its machines are not rented" for cloud, _ in places if cloud in OWN]
    return Prices(
        offers=tuple(dict.fromkeys(offers)),
        as_of=min((one.table.taken for one in found.values()), default=now).date(),
        source=max(
            (one.source for one in found.values()), key=FRESHEST_FIRST.index, default=FRESHEST_FIRST[0]
        ),
        notes=tuple(dict.fromkeys([*owned, *(note for one in found.values() for note in one.notes)])),
    )


def _find(
    clouds: Sequence[str], *, now: datetime, folder: Path, catalogs: Catalogs, refresh: bool
) -> dict[str, _CloudPrices]:
    local = (
        {} if refresh else {cloud: _find_without_request(cloud, now=now, folder=folder) for cloud in clouds}
    )
    to_ask = [cloud for cloud in clouds if not local.get(cloud)]
    answers = catalogs(to_ask) if to_ask else {}  # one request for all: SkyPilot's import is slow
    return {
        cloud: local.get(cloud) or _use_answer(cloud, answers[cloud], now=now, folder=folder)
        for cloud in clouds
    }


def _find_without_request(cloud: str, *, now: datetime, folder: Path) -> _CloudPrices | None:
    """Return prices that need no request: a fresh cache, or the fallback if SkyPilot has just failed."""
    cached = store.load_cached(cloud, folder=folder)
    if cached and store.is_fresh(cached, now=now):
        return _CloudPrices(cached, "cache")
    why = store.recent_failure(cloud, now=now, folder=folder)
    return _fallback(cloud, why, folder=folder) if why else None


def _use_answer(cloud: str, answer: Fetched | UserError, *, now: datetime, folder: Path) -> _CloudPrices:
    """Return the prices of SkyPilot's answer, else the fallback; raises SkyPilot's error if there is neither."""
    if isinstance(answer, Fetched) and answer.rows:
        return _live(cloud, answer, now=now, folder=folder)
    error = Unavailable(f"SkyPilot lists no GPUs of {cloud}") if isinstance(answer, Fetched) else answer
    found = _fallback(cloud, error.message, folder=folder)
    if found is None:
        raise error
    if isinstance(error, Unavailable):  # not if SkyPilot is missing: it is used as soon as it is installed
        store.record_failure(cloud, error.message, now=now, folder=folder)
    return found


def _live(cloud: str, answer: Fetched, *, now: datetime, folder: Path) -> _CloudPrices:
    """Return SkyPilot's prices; cache them only if it gave no warning, such as that its own copy is old."""
    table = Table(now, "SkyPilot's catalog", answer.rows)
    if not answer.warnings:
        store.write_cache(cloud, table, folder=folder)
    return _CloudPrices(table, "skypilot", tuple(f"SkyPilot: {text}" for text in answer.warnings))


def _fallback(cloud: str, why: str, *, folder: Path) -> _CloudPrices | None:
    """Return the newer of the old cache and the snapshot, with a note that has its date and the reason."""
    tables: dict[Source, Table | None] = {
        "cache": store.load_cached(cloud, folder=folder),
        "snapshot": store.load_snapshot(cloud),
    }
    known = [(table, source) for source, table in tables.items() if table]
    if not known:
        return None
    table, source = max(known, key=lambda one: one[0].taken)
    note = f"{cloud}: prices of {table.taken.date()}, from the {NAMES[source]}: {why}"
    return _CloudPrices(table, source, (note,))


def _offers(table: Table, region: str | None) -> Iterable[Offer]:
    rows = [row for row in table.rows if region in (None, row.region)]
    if region and not rows:
        regions = sorted({row.region for row in table.rows})
        cloud = table.rows[0].infra
        raise UserError(f"{cloud} has no GPUs in region `{region}`", hint=_suggest(region, regions))
    return (offer for row in rows if (offer := offer_of(row)))


def _parse_place(infra: str) -> tuple[str, str | None]:
    """Return the cloud and the region of `gcp/us-central1`; raises UserError for an unknown cloud."""
    cloud, _, region = infra.lower().partition("/")
    cloud = ALIASES.get(cloud, cloud)
    known = (*skypilot.PRICED, *OWN)
    if cloud not in known:
        several = " ".join(f"--infra {name.strip()}" for name in infra.split(","))
        hint = f"repeat the option: `{several}`" if "," in infra else _suggest(cloud, known)
        raise UserError(f"unknown infrastructure `{infra}`", hint=hint)
    return cloud, region or None


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return (
        f"did you mean {', '.join(f'`{word}`' for word in near)}?" if near else f"known: {', '.join(known)}"
    )

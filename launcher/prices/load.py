"""What can be rented, and for how much: from SkyPilot's catalog by way of a cache, else from the shipped snapshot."""

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

__all__ = ["DEFAULT_INFRA", "Catalogs", "Offer", "Prices", "load_prices"]

DEFAULT_INFRA = ("gcp", "lambda")
OWN = (*skypilot.UNPRICED, "local")
"""Machines that are not rented, so that no plan for them has a price."""
ALIASES = {"k8s": "kubernetes"}
"""SkyPilot's short forms."""

Source = Literal["skypilot", "cache", "snapshot"]
LIVELY: tuple[Source, ...] = ("skypilot", "cache", "snapshot")
"""The most live first."""
NAMES = {"cache": "cache", "snapshot": "shipped snapshot"}
Catalogs = Callable[[Sequence[str]], Mapping[str, Fetched | UserError]]
"""`launcher.cloud.skypilot.catalogs`, or a stand-in for it."""


class _CloudPrices(NamedTuple):
    """A cloud's prices, where they are from, and what there is to say of that."""

    table: Table
    source: Source
    notes: tuple[str, ...] = ()


def load_prices(
    *,
    now: datetime,
    infra: Sequence[str] = DEFAULT_INFRA,
    folder: Path | None = None,
    catalogs: Catalogs = skypilot.catalogs,
    refresh: bool = False,
) -> Prices:
    """Prices of machines with GPUs: for each cloud a fresh cache, else SkyPilot's catalog, else the newest known.

    A cache counts as fresh for `store.FRESH`, and a failure is not tried again within `store.RETRY`; `refresh`
    asks SkyPilot in any case. It is imported only to be asked. With `folder` None the cache is the user's.

    Args:
        now: with a time zone.
        infra: as SkyPilot writes it, `gcp` or `gcp/us-central1`.
        folder: of the cache.
        catalogs: what asks SkyPilot.
        refresh: leave the cache unread.

    Raises:
        UserError: a cloud or a region that nobody knows, or a cloud with no prices anywhere.
    """
    places = [_place(name) for name in infra]
    clouds = list(dict.fromkeys(cloud for cloud, _ in places if cloud not in OWN))
    found = _find(clouds, now=now, folder=folder or store.cache_folder(), catalogs=catalogs, refresh=refresh)
    offers = [
        offer for cloud, region in places if cloud in found for offer in _offers(found[cloud].table, region)
    ]
    owned = [f"{cloud} has no prices: its machines are not rented" for cloud, _ in places if cloud in OWN]
    return Prices(
        offers=tuple(dict.fromkeys(offers)),
        as_of=min((one.table.taken for one in found.values()), default=now).date(),
        source=max((one.source for one in found.values()), key=LIVELY.index, default=LIVELY[0]),
        notes=tuple(dict.fromkeys([*owned, *(note for one in found.values() for note in one.notes)])),
    )


def _find(
    clouds: Sequence[str], *, now: datetime, folder: Path, catalogs: Catalogs, refresh: bool
) -> dict[str, _CloudPrices]:
    at_hand = {} if refresh else {cloud: _at_hand(cloud, now=now, folder=folder) for cloud in clouds}
    asked = [cloud for cloud in clouds if not at_hand.get(cloud)]
    answers = catalogs(asked) if asked else {}
    return {
        cloud: at_hand.get(cloud) or _answered(cloud, answers[cloud], now=now, folder=folder)
        for cloud in clouds
    }


def _at_hand(cloud: str, *, now: datetime, folder: Path) -> _CloudPrices | None:
    """What need not be asked for: a fresh cache, or the fallback if SkyPilot has just failed."""
    kept = store.cached(cloud, folder=folder)
    if kept and store.fresh(kept, now=now):
        return _CloudPrices(kept, "cache")
    why = store.failure(cloud, now=now, folder=folder)
    return _fallback(cloud, why, folder=folder) if why else None


def _answered(cloud: str, answer: Fetched | UserError, *, now: datetime, folder: Path) -> _CloudPrices:
    """SkyPilot's answer, or the fallback; raises SkyPilot's error if there is none."""
    if isinstance(answer, Fetched) and answer.rows:
        return _live(cloud, answer, now=now, folder=folder)
    why = Unavailable(f"SkyPilot lists no GPUs of {cloud}") if isinstance(answer, Fetched) else answer
    found = _fallback(cloud, why.message, folder=folder)
    if found is None:
        raise why
    if isinstance(why, Unavailable):  # a missing SkyPilot is looked for each time
        store.keep_failure(cloud, why.message, now=now, folder=folder)
    return found


def _live(cloud: str, answer: Fetched, *, now: datetime, folder: Path) -> _CloudPrices:
    """SkyPilot's answer; kept only if it had nothing to warn of, such as that its own copy is old."""
    table = Table(now, "SkyPilot's catalog", answer.rows)
    if not answer.warnings:
        store.keep(cloud, table, folder=folder)
    return _CloudPrices(table, "skypilot", tuple(f"SkyPilot: {text}" for text in answer.warnings))


def _fallback(cloud: str, why: str, *, folder: Path) -> _CloudPrices | None:
    """The newer of an old cache and the snapshot, with a note of its date and of why it is used."""
    tables: dict[Source, Table | None] = {
        "cache": store.cached(cloud, folder=folder),
        "snapshot": store.snapshot(cloud),
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
        raise UserError(f"{cloud} has no GPUs in a region `{region}`", hint=_near(region, regions))
    return (offer for row in rows if (offer := offer_of(row)))


def _place(infra: str) -> tuple[str, str | None]:
    """Cloud and region of `gcp/us-central1`; raises UserError for a cloud that nobody knows."""
    cloud, _, region = infra.lower().partition("/")
    cloud = ALIASES.get(cloud, cloud)
    known = (*skypilot.PRICED, *OWN)
    if cloud not in known:
        several = " ".join(f"--infra {name.strip()}" for name in infra.split(","))
        hint = f"one at a time: `{several}`" if "," in infra else _near(cloud, known)
        raise UserError(f"no infrastructure is called `{infra}`", hint=hint)
    return cloud, region or None


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return (
        f"did you mean {', '.join(f'`{word}`' for word in near)}?" if near else f"known: {', '.join(known)}"
    )

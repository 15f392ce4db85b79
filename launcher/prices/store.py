"""Prices on this machine: a cache, one file a cloud, and the snapshot that is shipped with the package."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path

from launcher.cloud.protocol import CatalogRow

log = logging.getLogger(__name__)

FRESH = timedelta(hours=24)
"""SkyPilot's own catalog is rebuilt every 7 hours (README of github.com/skypilot-org/skypilot-catalog);
a plan is made to decide between prices that differ by more than a day's drift."""
RETRY = timedelta(minutes=10)
"""For so long nobody asks again after SkyPilot had no answer: each time costs its import, and the wait."""
SNAPSHOT = Path(__file__).with_name("snapshot.json")


def cache_folder() -> Path:
    """The user's folder for prices: `~/.cache/aeolus/prices` on Linux."""
    return user_cache_path("aeolus") / "prices"


def cached(infra: str, *, folder: Path) -> Table | None:
    """What the cache has of a cloud, however old; None if nothing, or nothing that can be read."""
    path = folder / f"{infra}.json"
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info("prices in %s are not used: %s", path, error)
        return None


def keep(infra: str, table: Table, *, folder: Path) -> None:
    """Write a cloud's prices into the cache, whole or not at all; a cache that cannot be written is no error."""
    _write(folder / f"{infra}.json", dump(table))


def keep_failure(infra: str, message: str, *, now: datetime, folder: Path) -> None:
    """Remember that a cloud's prices could not be had now, and why."""
    _write(folder / f"{infra}.failed", f"{now.isoformat()}\n{message}")


def failure(infra: str, *, now: datetime, folder: Path) -> str | None:
    """Why a cloud's prices could not be had a moment ago; None if nobody asked within `RETRY`."""
    try:
        when, _, message = (folder / f"{infra}.failed").read_text(encoding="utf-8").partition("\n")
        lately = timedelta(0) <= now - datetime.fromisoformat(when) < RETRY
    except (OSError, ValueError, TypeError):  # not there, or damaged; TypeError: a time without a zone
        return None
    return message if lately else None


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        log.info("prices are not kept in %s: %s", path, error)


def fresh(table: Table, *, now: datetime) -> bool:
    """Young enough to be used without asking; a table from the future is not."""
    return timedelta(0) <= now - table.taken < FRESH


def snapshot(infra: str, *, path: Path = SNAPSHOT) -> Table | None:
    """The shipped prices of a cloud; None if it is not among them."""
    table = parse(path.read_text(encoding="utf-8"))
    rows = tuple(row for row in table.rows if row.infra == infra)
    return table._replace(rows=rows) if rows else None


FORMAT = 1


class Table(NamedTuple):
    """Rows, and when they were taken."""

    taken: datetime
    source: str
    rows: tuple[CatalogRow, ...]


def dump(table: Table) -> str:
    """The file's text; rows sorted, so that equal tables are equal files."""
    head = {
        "format": FORMAT,
        "taken": table.taken.astimezone(UTC).isoformat(timespec="seconds"),
        "source": table.source,
        "columns": CatalogRow._fields,
    }
    lines = [json.dumps(row) for row in sorted(table.rows, key=lambda row: row[:3])]
    return json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def parse(text: str) -> Table:
    """The table that a file holds; raises ValueError for anything else, of whatever kind the damage is."""
    try:
        content: Any = json.loads(text)
        if content["format"] != FORMAT or content["columns"] != list(CatalogRow._fields):
            raise ValueError("a table of another version")
        taken = datetime.fromisoformat(content["taken"])
        if taken.tzinfo is None:
            raise ValueError("a table of no certain hour")
        return Table(taken.astimezone(UTC), str(content["source"]), tuple(map(_row, content["rows"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a table of prices: {error!r}") from None


def read(path: Path) -> Table:
    """The table in a file; raises OSError if it cannot be read, ValueError if it holds none."""
    return parse(path.read_text(encoding="utf-8"))


def _row(cells: list[Any]) -> CatalogRow:
    infra, region, instance_type, accelerator, gpus, cores, memory, usd, spot = cells
    return CatalogRow(
        str(infra),
        str(region),
        str(instance_type),
        str(accelerator),
        int(gpus),
        int(cores),
        float(memory),
        None if usd is None else float(usd),
        None if spot is None else float(spot),
    )

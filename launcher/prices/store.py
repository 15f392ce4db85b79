"""Prices stored on this machine: a cache with one file per cloud, and the snapshot that ships with the package."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path

from launcher.cloud.protocol import CatalogRow
from trainer.files import write_atomically

log = logging.getLogger(__name__)

MAX_AGE = timedelta(hours=24)
"""Older cached prices are requested again. SkyPilot rebuilds its own catalog every 7 hours (README of
github.com/skypilot-org/skypilot-catalog), but prices drift by less in a day than the offers of a plan differ."""
RETRY_INTERVAL = timedelta(minutes=10)
"""After a failure, SkyPilot is not asked again for this long: every try costs its slow import and a network timeout."""
SNAPSHOT = Path(__file__).with_name("snapshot.json")
FORMAT = 1
"""The version of the file format."""


class Table(NamedTuple):
    """Catalog rows, and when they were read from the catalog."""

    taken: datetime
    source: str
    rows: tuple[CatalogRow, ...]


def cache_folder() -> Path:
    """Return the user's cache folder for prices: `~/.cache/aeolus/prices` on Linux."""
    return user_cache_path("aeolus") / "prices"


def load_cached(infra: str, *, folder: Path) -> Table | None:
    """Return the cached prices of a cloud, of any age; None if there is no readable cache file."""
    path = folder / f"{infra}.json"
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info("the cached prices in %s are ignored: %s", path, error)
        return None


def write_cache(infra: str, table: Table, *, folder: Path) -> None:
    """Write a cloud's prices to the cache atomically; a cache that cannot be written is no error."""
    _write(folder / f"{infra}.json", dump(table))


def record_failure(infra: str, message: str, *, now: datetime, folder: Path) -> None:
    """Record that the request for a cloud's prices failed just now, and why."""
    _write(folder / f"{infra}.failed", f"{now.isoformat()}\n{message}")


def recent_failure(infra: str, *, now: datetime, folder: Path) -> str | None:
    """Return why the last request for a cloud's prices failed; None if none failed within `RETRY_INTERVAL`."""
    try:
        when, _, message = (folder / f"{infra}.failed").read_text(encoding="utf-8").partition("\n")
        is_recent = timedelta(0) <= now - datetime.fromisoformat(when) < RETRY_INTERVAL
    except (
        OSError,
        ValueError,
        TypeError,
    ):  # no such file, or a damaged one; TypeError: a time without a zone
        return None
    return message if is_recent else None


def is_fresh(table: Table, *, now: datetime) -> bool:
    """Return whether a table is young enough to be used without a new request; one from the future is not."""
    return timedelta(0) <= now - table.taken < MAX_AGE


def load_snapshot(infra: str, *, path: Path = SNAPSHOT) -> Table | None:
    """Return the shipped prices of a cloud; None if the snapshot does not have this cloud."""
    table = parse(path.read_text(encoding="utf-8"))
    rows = tuple(row for row in table.rows if row.infra == infra)
    return table._replace(rows=rows) if rows else None


def dump(table: Table) -> str:
    """Return a table as the text of its file; rows are sorted, so that equal tables give equal files."""
    head = {
        "format": FORMAT,
        "taken": table.taken.astimezone(UTC).isoformat(timespec="seconds"),
        "source": table.source,
        "columns": CatalogRow._fields,
    }
    lines = [json.dumps(row) for row in sorted(table.rows, key=lambda row: row[:3])]
    return json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def parse(text: str) -> Table:
    """Return the table that a file's text holds.

    Raises:
        ValueError: the text is damaged, is no table, or has another format version.
    """
    try:
        content: Any = json.loads(text)
        if content["format"] != FORMAT or content["columns"] != list(CatalogRow._fields):
            raise ValueError("the price table has another format version")
        taken = datetime.fromisoformat(content["taken"])
        if taken.tzinfo is None:
            raise ValueError("the price table's time has no time zone")
        return Table(taken.astimezone(UTC), str(content["source"]), tuple(map(_row, content["rows"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not a price table: {error!r}") from None


def read(path: Path) -> Table:
    """Return the table in a file; raises OSError if it cannot be read, ValueError if it holds no table."""
    return parse(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        log.info("the prices are not cached: %s cannot be written: %s", path, error)


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

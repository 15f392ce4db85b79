"""A file of prices: JSON with one row a line, so that a snapshot's changes can be read in a diff."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from launcher.prices.offer import Row

FORMAT = 1


class Table(NamedTuple):
    """Rows, and when they were taken."""

    taken: datetime
    source: str
    rows: tuple[Row, ...]


def dump(table: Table) -> str:
    """The file's text; rows sorted, so that equal tables are equal files."""
    head = {
        "format": FORMAT,
        "taken": table.taken.astimezone(UTC).isoformat(timespec="seconds"),
        "source": table.source,
        "columns": Row._fields,
    }
    lines = [json.dumps(row) for row in sorted(table.rows, key=lambda row: row[:3])]
    return json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def parse(text: str) -> Table:
    """The table that a file holds; raises ValueError for anything else, of whatever kind the damage is."""
    try:
        content: Any = json.loads(text)
        if content["format"] != FORMAT or content["columns"] != list(Row._fields):
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


def _row(cells: list[Any]) -> Row:
    infra, region, instance_type, accelerator, gpus, cores, memory, usd, spot = cells
    return Row(
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

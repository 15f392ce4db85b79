"""Regenerate `snapshot.json` from SkyPilot's catalog: `python -m launcher.prices.make_snapshot`.

SkyPilot downloads the catalog, or reads the copy in `$SKY_RUNTIME_DIR/.sky/catalogs/v8`. For a copy, pass its day with
`--date`. The catalog is https://github.com/skypilot-org/skypilot-catalog, of the SkyPilot project, under the Apache
License 2.0.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from launcher.cloud import skypilot
from launcher.cloud.protocol import CatalogRow
from launcher.prices.load import DEFAULT_INFRA
from launcher.prices.store import SNAPSHOT, Table, dump
from trainer.errors import UserError

SOURCE = "SkyPilot's catalog v8, https://github.com/skypilot-org/skypilot-catalog, Apache License 2.0"


def make_text(infra: tuple[str, ...], taken: datetime) -> str:
    """Return the text of the snapshot; raises UserError if SkyPilot has no prices for one of the clouds."""
    rows: list[CatalogRow] = []
    for answer in skypilot.catalogs(infra).values():
        if isinstance(answer, UserError):
            raise answer
        rows += answer.rows
    return dump(Table(taken, SOURCE, tuple(rows)))


def main() -> None:
    """Parse the command line and write the snapshot."""
    parser = argparse.ArgumentParser(description="regenerate the shipped price snapshot")
    parser.add_argument("--infra", nargs="+", default=DEFAULT_INFRA, help="clouds, by SkyPilot's names")
    parser.add_argument(
        "--date", type=datetime.fromisoformat, default=None, help="day of the catalog (default: now)"
    )
    arguments = parser.parse_args()
    taken = arguments.date.replace(tzinfo=UTC) if arguments.date else datetime.now(UTC)
    SNAPSHOT.write_text(make_text(tuple(arguments.infra), taken), encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m launcher.prices.make_snapshot`: write `snapshot.json` anew from SkyPilot's catalog.

SkyPilot downloads the catalog, or takes the one that lies in `$SKY_RUNTIME_DIR/.sky/catalogs/v8`; then `--date`
says of which day that is. The catalog is https://github.com/skypilot-org/skypilot-catalog, of the SkyPilot
project, which is under the Apache License 2.0.
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


def text(infra: tuple[str, ...], taken: datetime) -> str:
    """The whole file; raises UserError if SkyPilot has no prices for one of the clouds."""
    rows: list[CatalogRow] = []
    for answer in skypilot.catalogs(infra).values():
        if isinstance(answer, UserError):
            raise answer
        rows += answer.rows
    return dump(Table(taken, SOURCE, tuple(rows)))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="write the shipped price snapshot anew")
    parser.add_argument("--infra", nargs="+", default=DEFAULT_INFRA, help="clouds, as SkyPilot calls them")
    parser.add_argument("--date", type=datetime.fromisoformat, default=None, help="of the catalog; else now")
    given = parser.parse_args()
    taken = given.date.replace(tzinfo=UTC) if given.date else datetime.now(UTC)
    SNAPSHOT.write_text(text(tuple(given.infra), taken), encoding="utf-8")


if __name__ == "__main__":
    main()

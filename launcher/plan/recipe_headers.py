"""The predictions in the headers of the shipped recipes: `python -m launcher.plan.recipe_headers`, after the snapshot or
the estimate has changed. They are of the snapshot's prices, so that anybody gets the same.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from launcher.plan.rank import PlanRequest, PlanRow, parse_gpus, plan
from launcher.plan.workload import workload_of
from launcher.prices import store
from launcher.prices.offer import Prices, offer_of
from trainer.architecture.lookup import find_architecture
from trainer.recipe import Recipe, load
from trainer.recipe.yaml_file import RECIPES

FAMILIES = ("zephyr-7b", "notus-7b")
"""Whose data sets are known; what is trained on this machine has no price."""
INFRA = ("gcp", "lambda")
LARGE, SMALL = ("A100-80GB:8", "A100:8"), ("A100:1", "L4:1")
LINE = re.compile(r"^# [Pp]redicted:.*$", re.MULTILINE)


def named() -> list[str]:
    """The recipes that have a prediction."""
    return sorted(
        f"{path.parent.name}/{path.stem}" for family in FAMILIES for path in (RECIPES / family).glob("*.yaml")
    )


def prediction(recipe: Recipe) -> str:
    """One line: on the GPUs that it is made for, what is expected in the cheapest place."""
    prices = _shipped()
    gpus = SMALL if recipe.quantised_bits == 4 else LARGE
    found = "; ".join(filter(None, (_on(recipe, prices, each) for each in gpus)))
    return f"# Predicted: {found} (prices of {prices.as_of})."


def write(path: Path) -> None:
    """Put a recipe's prediction into its header."""
    line = prediction(load(path).recipe)
    path.write_text(LINE.sub(line, path.read_text(), count=1))


def _on(recipe: Recipe, prices: Prices, gpus: str) -> str | None:
    accelerator, count = parse_gpus(gpus)
    wishes = PlanRequest(accelerator=accelerator, count=count)
    found = plan(recipe, find_architecture(recipe, online=False), prices, workload_of(recipe), wishes)
    return _words(found.chosen) if found.chosen else None


def _words(row: PlanRow) -> str:
    kind = "spot" if row.spot else "on demand"
    return f"{row.hours:.1f} h and ${row.usd:,.0f} on {row.shape} {kind} at {row.offer.infra}"


def _shipped() -> Prices:
    tables = [table for infra in INFRA if (table := store.load_snapshot(infra))]
    offers = [offer for table in tables for row in table.rows if (offer := offer_of(row))]
    taken = min((table.taken for table in tables), default=datetime.now(UTC))
    return Prices(offers=tuple(offers), as_of=taken.date(), source="snapshot")


if __name__ == "__main__":
    for name in named():
        write(RECIPES / f"{name}.yaml")

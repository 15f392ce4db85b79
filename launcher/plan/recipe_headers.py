"""Update the predictions in the headers of the shipped recipes: `python -m launcher.plan.recipe_headers`.

Run it after the price snapshot or the estimate has changed. Predictions use the snapshot's prices, so that every machine
writes the same text.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from launcher.plan.plan import find_workload
from launcher.plan.rank import PlanRequest, PlanRow, parse_gpus, plan
from launcher.prices import store
from launcher.prices.offer import Prices, offer_of
from trainer.architecture.lookup import find_architecture
from trainer.recipe import Recipe, load
from trainer.recipe.yaml_file import RECIPES

FAMILIES = ("zephyr-7b", "notus-7b")
"""The families with known data sets. The others train on this machine, which has no price."""
INFRA = ("gcp", "lambda")
LARGE, SMALL = ("A100-80GB:8", "A100:8"), ("A100:1", "L4:1")
"""GPUs of the predictions: SMALL for recipes that load the model in 4 bits, LARGE for the others."""
LINE = re.compile(r"^# [Pp]redicted:.*$", re.MULTILINE)


def predicted_recipes() -> list[str]:
    """Return the names of the recipes that have a prediction."""
    return sorted(
        f"{path.parent.name}/{path.stem}" for family in FAMILIES for path in (RECIPES / family).glob("*.yaml")
    )


def predict(recipe: Recipe) -> str:
    """Return the header line: hours and dollars at the cheapest offer of each GPU type that the recipe is made for."""
    prices = _snapshot_prices()
    gpus = SMALL if recipe.quantised_bits == 4 else LARGE
    found = "; ".join(filter(None, (_predict_on(recipe, prices, name) for name in gpus)))
    return f"# Predicted: {found} (prices of {prices.as_of})."


def write(path: Path) -> None:
    """Replace the prediction in the header of a recipe's file."""
    line = predict(load(path).recipe)
    path.write_text(LINE.sub(line, path.read_text(), count=1))


def _predict_on(recipe: Recipe, prices: Prices, gpus: str) -> str | None:
    accelerator, count = parse_gpus(gpus)
    request = PlanRequest(accelerator=accelerator, count=count)
    found = plan(recipe, find_architecture(recipe, online=False), prices, find_workload(recipe), request)
    return _describe(found.chosen) if found.chosen else None


def _describe(row: PlanRow) -> str:
    kind = "spot" if row.spot else "on demand"
    return f"{row.hours:.1f} h and ${row.usd:,.0f} on {row.shape} {kind} at {row.offer.infra}"


def _snapshot_prices() -> Prices:
    tables = [table for infra in INFRA if (table := store.load_snapshot(infra))]
    offers = [offer for table in tables for row in table.rows if (offer := offer_of(row))]
    taken = min((table.taken for table in tables), default=datetime.now(UTC))
    return Prices(offers=tuple(offers), as_of=taken.date(), source="snapshot")


if __name__ == "__main__":
    for recipe_name in predicted_recipes():
        write(RECIPES / f"{recipe_name}.yaml")

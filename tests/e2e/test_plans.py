"""What `submit` would send for every shipped recipe, as SkyPilot's own optimizer reads it: it rents what `plan` said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cloud.protocol import CatalogRow
from launcher.prices.store import SNAPSHOT
from trainer.recipe import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.e2e.lab.lab import Lab

MARKETS = ((), ("--spot",), ("--on-demand",))
NAMED = (
    ("zephyr-7b/dpo_full", "--gpus", "A100-80GB:8"),
    ("zephyr-7b/dpo_full", "--gpus", "A100:8"),
    ("zephyr-7b/dpo_full", "--gpus", "H100:8", "--on-demand"),
    ("zephyr-7b/sft_full", "--gpus", "A100:8", "--infra", "lambda"),
    ("notus-7b/dpo_full", "--gpus", "A100:8", "--spot"),
    ("zephyr-7b/dpo_qlora", "--gpus", "L4:1", "--spot"),
    ("notus-7b/dpo_lora", "--gpus", "A100"),
)
MANY = [(name, *market) for name in names() for market in MARKETS]
SAMPLE = [*((name, *MARKETS[number % len(MARKETS)]) for number, name in enumerate(names())), *NAMED]
"""Each recipe with one market, and each market."""
REQUESTS = [*SAMPLE, *(pytest.param(each, marks=pytest.mark.thorough) for each in MANY if each not in SAMPLE)]


@pytest.fixture(scope="module")
def planned(lab: Lab, request: pytest.FixtureRequest) -> dict[tuple[str, ...], dict[str, Any]]:
    """Each selected request's task and plan row, as `submit --dryrun --json` prints them."""
    lab.sky.pretend("GCP", "Lambda")
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = [call.params["request_"] for call in calls if "request_" in call.params]
    words = ("--dryrun", "--json", "--checkpoints", "gs://a-bucket/runs")
    answers = lab.launcher.answers([("submit", *each, *words) for each in asked])
    return dict(zip(asked, answers, strict=True))


@pytest.fixture(scope="module")
def optimized(
    lab: Lab, planned: dict[tuple[str, ...], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, ...], dict[str, Any]]:
    """What SkyPilot would rent for each of these tasks."""
    lab.sky.pretend("GCP", "Lambda")
    folder = tmp_path_factory.mktemp("tasks")
    files = [folder / f"{number}.json" for number in range(len(planned))]
    for file, made in zip(files, planned.values(), strict=True):
        file.write_text(json.dumps(made["task"]))  # which is YAML, too
    return dict(zip(planned, (task for [task] in lab.sky.chosen(files)), strict=True))


@pytest.mark.parametrize("request_", REQUESTS, ids=" ".join)
def test_skypilot_would_rent_what_the_plan_says(
    planned: dict[tuple[str, ...], dict[str, Any]],
    optimized: dict[tuple[str, ...], dict[str, Any]],
    request_: tuple[str, ...],
) -> None:
    """Cloud, machine, GPUs, market and price; of regions at one price it may take any."""
    row, rented = planned[request_]["row"], optimized[request_]
    offer, shape = row["offer"], row["shape"]
    assert rented["infra"] == offer["infra"]
    assert rented["instance_type"] == offer["instance_type"]
    assert rented["gpus"] == {shape["accelerator"]: shape["count"]}
    assert rented["spot"] == row["spot"]
    assert rented["usd_per_h"] == pytest.approx(row["usd_per_h"], abs=0.005)
    assert rented["region"] in at_one_price(row)
    assert planned[request_]["verb"] == ("sky jobs launch" if row["spot"] else "sky launch")


def at_one_price(row: dict[str, Any]) -> set[str]:
    """Regions that have the machine at the row's price."""
    alike = [
        each
        for each in (CatalogRow(*row) for row in json.loads(Path(SNAPSHOT).read_text())["rows"])
        if (each.infra, each.instance_type) == (row["offer"]["infra"], row["offer"]["instance_type"])
        and each.accelerator == row["shape"]["accelerator"]
    ]
    prices = {each.region: each.spot_usd_per_h if row["spot"] else each.usd_per_h for each in alike}
    return {region for region, price in prices.items() if price == row["usd_per_h"]}

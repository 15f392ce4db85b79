"""The plan for a recipe with all that it depends on looked up, and the refusal where nothing will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from launcher.plan.rank import Plan, PlanRequest, Rejected, plan
from launcher.plan.workload import workload_of
from launcher.prices.load import load_prices
from launcher.prices.offer import Prices
from trainer.architecture.lookup import find_architecture
from trainer.errors import NoFit
from trainer.recipe import Recipe

SHOWN = 6
"""Rejections that a refusal lists."""
LoadPrices = Callable[..., Prices]
"""`launcher.prices.load.load_prices`, or a stand-in for it."""


def planned(  # noqa: PLR0913 (what a plan depends on)
    recipe: Recipe,
    wishes: PlanRequest,
    *,
    infra: Sequence[str],
    now: datetime,
    rows: int | None = None,
    refresh: bool = False,
    prices: LoadPrices = load_prices,
) -> Plan:
    """The plan for a recipe: its architecture and its data looked up, prices asked for."""
    found = prices(now=now, infra=infra, refresh=refresh)
    workload = workload_of(recipe, rows=rows)
    return plan(recipe, find_architecture(recipe), found, workload, wishes)


def refusal(found: Plan) -> NoFit:
    """That nothing will do: each rejection, and the ways out that they name."""
    lines = [f"\n  {each.what}: {each.why}" for each in found.rejected[:SHOWN]]
    more = len(found.rejected) - SHOWN
    rest = f"\n  and {more} more: `launcher plan --all`" if more > 0 else ""
    return NoFit(f"{found.recipe}: {found.why}{''.join(lines)}{rest}", hint=way_out(found.rejected))


def way_out(rejected: Sequence[Rejected]) -> str:
    """What the rejections themselves propose: of what fits but for a limit, else the most frequent."""
    near = [each for each in rejected if each.fits] or rejected
    ways = [each.way_out for each in near if each.way_out]
    return max(ways, key=ways.count) if ways else "name other GPUs"

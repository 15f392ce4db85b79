"""What a rented node is told of money: what its kind costs wherever it may stand, and what the plan promised; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from launcher.plan.rank import PlanRow
from launcher.prices.offer import Offer
from launcher.submit.task import Candidate
from trainer.accounting import Limits
from trainer.options import BUDGET_USD, DEADLINE_H, PLAN, PRICES, USD_PER_H


def variables(
    row: PlanRow, candidates: Sequence[Candidate], offers: Iterable[Offer], *, nodes: int
) -> dict[str, str]:
    """The environment of a task: the trainer finds its own price in it, wherever SkyPilot has put it."""
    listed = list(prices(candidates, offers, nodes=nodes))
    return {PRICES: _text(listed), PLAN: _text(promised(row))}


def own_price(usd_per_h: float | None) -> dict[str, str]:
    """The same for a machine that is not rented."""
    return {} if usd_per_h is None else {USD_PER_H: f"{usd_per_h:g}"}


def limits(kept: Limits) -> dict[str, str]:
    """The limits that the run's own supervisor keeps."""
    told = {BUDGET_USD: kept.budget_usd, DEADLINE_H: kept.deadline_h}
    return {name: f"{value:.10g}" for name, value in told.items() if value is not None}


def prices(
    candidates: Sequence[Candidate], offers: Iterable[Offer], *, nodes: int
) -> Iterator[Mapping[str, Any]]:
    """An entry for each region that a candidate may land in, at its price for all nodes.

    A candidate names a cloud, and SkyPilot goes through its regions; prices differ between them.
    """
    for offer in offers:
        gpus = f"{offer.shape.accelerator}:{offer.shape.count}"
        for market, spot, usd_per_h in (
            ("spot", True, offer.spot_usd_per_h),
            ("on demand", False, offer.usd_per_h),
        ):
            wanted = any(
                each.accelerators == gpus
                and each.use_spot is spot
                and each.instance_type in (None, offer.instance_type)
                and each.infra in (offer.infra, f"{offer.infra}/{offer.region}")
                for each in candidates
            )
            if wanted and usd_per_h is not None:
                yield {
                    "infra": f"{offer.infra}/{offer.region}",
                    "gpus": gpus,
                    "market": market,
                    "usd_per_h": round(usd_per_h * nodes, 6),
                    "instance_type": offer.instance_type,
                }


def promised(row: PlanRow) -> Mapping[str, Any]:
    """The chosen row in the numbers that a report can hold against what came of it."""
    return {
        "hours": round(row.hours, 4),
        "usd": round(row.usd, 4),
        "usd_per_h": round(row.usd_per_h, 6),
        "market": "spot" if row.spot else "on demand",
        "infra": f"{row.offer.infra}/{row.offer.region}",
        "gpus": f"{row.shape.accelerator}:{row.shape.count}",
        "nodes": row.shape.nodes,
        "gpu_gib": round(row.fit.gpu.gib, 2),
        "host_gib": round(row.fit.host.gib, 2),
        "step_s": round(row.estimate.step_s, 4),
        "steps": row.estimate.steps,
        "tokens_per_s": round(row.estimate.tokens_per_s, 1),
        "preemptions": round(row.expectation.preemptions, 3) if row.expectation else 0.0,
    }


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))

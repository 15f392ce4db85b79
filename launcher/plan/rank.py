"""Rank every offer that could run a recipe, by expected cost or hours, with a reason for every rejection; no I/O."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from launcher.plan.spot import SpotOutlook, market, save_steps, spot_expectation
from launcher.prices.offer import Offer, Prices
from trainer.architecture import Architecture
from trainer.errors import NoFit, UserError
from trainer.estimate import Estimate, Workload, estimate
from trainer.fit import Fit, fit
from trainer.hardware import Shape, gpu
from trainer.recipe import Recipe

NOTICE_S: Mapping[str, float] = {"gcp": 30, "aws": 120, "azure": 30}
"""Seconds from a cloud's preemption notice to the loss of the spot machine; other clouds give no notice.
https://cloud.google.com/compute/docs/instances/spot,
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
https://learn.microsoft.com/azure/virtual-machines/spot-vms"""
ARM = ("GH200", "GB200")
"""GPUs on boards with Arm cores (Grace). Our image and its wheels are for x86-64, so they are rejected unless named.
https://www.nvidia.com/en-us/data-center/grace-hopper-superchip"""
ARM_REASON = "its CPU is Arm, and the trainer's image is for x86-64; name it with `--gpus` to use it anyway"
By = Literal["dollars", "hours"]


class PlanRequest(BaseModel):
    """The user's choices for a plan: GPUs, market, limits and order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accelerator: str | None = None
    """SkyPilot's name of the GPU; None means any."""
    count: int | None = Field(default=None, ge=1)
    """GPUs per node; None means any number."""
    nodes: int = Field(default=1, ge=1)
    spot: bool | None = None
    """True means only spot, False only on demand, None both."""
    budget_usd: float | None = Field(default=None, gt=0)
    deadline_h: float | None = Field(default=None, gt=0)
    by: By = "dollars"


class PlanRow(BaseModel):
    """One option: a shape at an offer, with its expected hours and dollars."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offer: Offer
    """The offer in the cheapest region."""
    shape: Shape
    """The offer's shape, with the number of nodes."""
    spot: bool
    fit: Fit
    estimate: Estimate
    expectation: SpotOutlook | None
    """The effect of preemptions; None on demand."""
    usd_per_h: float
    """The price of all nodes together."""
    hours: float
    """Expected hours from the first request for a machine to the end of the run."""
    usd: float
    """Expected cost; the wait for a machine costs nothing."""
    save_steps: int | None
    """Steps between checkpoints that minimise the expected hours; None on demand, where the recipe's value is used."""

    def describe(self) -> str:
        """Return the option in words: `A100-80GB:8 spot on gcp (a2-ultragpu-8g, us-central1)`."""
        kind = "spot" if self.spot else "on demand"
        return f"{self.shape} {kind} on {self.offer.infra} ({self.offer.instance_type}, {self.offer.region})"


class Rejected(BaseModel):
    """An option that is not in the table, and the reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    why: str
    way_out: str | None = None
    """A change that would make it acceptable."""
    fits: bool = False
    """Whether it fits the recipe, and only the budget or the deadline rejects it."""


class Plan(BaseModel):
    """The ranked options, best first. The first one is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    workload: Workload
    rows: tuple[PlanRow, ...]
    rejected: tuple[Rejected, ...]
    why: str
    """The reason for the choice, or why there is none."""
    prices: str
    """The source and the date of the prices."""
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> PlanRow | None:
        return self.rows[0] if self.rows else None


class _Sized(NamedTuple):
    """A recipe's fit and estimate on a shape; they are the same in every region."""

    fit: Fit
    estimate: Estimate


def parse_gpus(text: str) -> tuple[str, int | None]:
    """Return name and count of `A100:8`; for `A100` the count is None, which means any.

    Raises:
        UserError: unknown GPU, or the count is no positive number.
    """
    name, colon, count = text.partition(":")
    if colon and not (count.isdecimal() and int(count)):
        raise UserError(
            f"`--gpus {text}`: {count!r} is not a number of GPUs",
            hint="write for example `A100:8`, or `A100` for any number",
        )
    return gpu(name.strip()).name, int(count) if colon else None


def plan(
    recipe: Recipe,
    architecture: Architecture | None,
    prices: Prices,
    workload: Workload,
    request: PlanRequest | None = None,
) -> Plan:
    """Rank every offer that could run the recipe, by expected cost or hours.

    Raises:
        UserError: no offer matches the request.
    """
    request = request or PlanRequest()
    if not prices.offers:
        raise UserError(
            "no machines are for rent on the requested infrastructure"
            + "".join(f"; {note}" for note in prices.notes),
            hint="name a cloud with `--infra`, or omit the option",
        )
    # One fit and one estimate per shape serve all clouds and regions that offer it.
    rejected: list[Rejected] = []
    rows: list[PlanRow] = []
    for shape, offers in _by_shape(_matching(prices.offers, request), request.nodes).items():
        sized = _size(recipe, architecture, shape, workload)
        if shape.accelerator in ARM and request.accelerator is None:
            sized = NoFit(ARM_REASON, hint=f"--gpus {shape.accelerator}")
        if isinstance(sized, NoFit):
            rejected.append(Rejected(what=_describe(shape, offers), why=sized.message, way_out=sized.hint))
        else:
            rows += _rows(shape, offers, sized, request)
    rows.sort(key=lambda row: _key(row, request.by))
    fitting, over_limit = _apply_limits(rows, request)
    return Plan(
        recipe=recipe.name,
        workload=workload,
        rows=tuple(fitting),
        # With no row left, the options that only a limit rejects come first: they are the nearest.
        rejected=(*rejected, *over_limit) if fitting else (*over_limit, *rejected),
        why=_why(fitting, request, over_limit),
        prices=f"{prices.source}, {prices.as_of.isoformat()}",
        notes=prices.notes,
    )


def _matching(offers: Sequence[Offer], request: PlanRequest) -> list[Offer]:
    """Return the offers of the requested GPUs and market; raises UserError if there are none."""
    of_name = [offer for offer in offers if request.accelerator in (None, offer.shape.accelerator)]
    if not of_name:
        available = sorted({offer.shape.accelerator or "" for offer in offers})
        near = difflib.get_close_matches(request.accelerator or "", available, n=3, cutoff=0.4) or available
        raise UserError(
            f"no cloud of this plan rents {request.accelerator}",
            hint=f"available: {', '.join(near)}",
        )
    of_count = [offer for offer in of_name if request.count in (None, offer.shape.count)]
    if not of_count:
        counts = ", ".join(str(count) for count in sorted({offer.shape.count for offer in of_name}))
        raise UserError(
            f"no cloud of this plan rents a machine with {request.count} x {request.accelerator}",
            hint=f"available counts: {counts}; `--gpus {request.accelerator}:N`",
        )
    return _on_market(of_count, request)


def _on_market(offers: list[Offer], request: PlanRequest) -> list[Offer]:
    """Return the offers of the requested market; raises UserError if there are none."""
    if request.spot is None:
        return offers
    found = [
        offer for offer in offers if (offer.spot_usd_per_h if request.spot else offer.usd_per_h) is not None
    ]
    if not found:
        market_name = "spot" if request.spot else "on demand"
        clouds = ", ".join(sorted({offer.infra for offer in offers}))
        raise UserError(
            f"{clouds} rents no {request.accelerator or 'GPUs'} {market_name}",
            hint=f"omit `--{market_name.replace(' ', '-')}`, or name other clouds with `--infra`",
        )
    return found


def _by_shape(offers: Iterable[Offer], nodes: int) -> dict[Shape, list[Offer]]:
    """Return the offers grouped by shape: an instance type is one group, in all of its regions."""
    shapes: dict[Shape, list[Offer]] = {}
    for offer in offers:
        shapes.setdefault(offer.shape.model_copy(update={"nodes": nodes}), []).append(offer)
    return shapes


def _size(
    recipe: Recipe, architecture: Architecture | None, shape: Shape, workload: Workload
) -> _Sized | NoFit:
    try:
        chosen = fit(recipe, shape, architecture)
    except NoFit as error:
        return error
    assert architecture is not None  # noqa: S101 - `fit` raises NoFit for a GPU if it is None
    return _Sized(chosen, estimate(recipe, architecture, chosen, shape, workload))


def _rows(shape: Shape, offers: Sequence[Offer], sized: _Sized, request: PlanRequest) -> Iterator[PlanRow]:
    """Yield at most two options per cloud: on demand and spot, each in its cheapest region."""
    for infra in dict.fromkeys(offer.infra for offer in offers):
        of_cloud = [offer for offer in offers if offer.infra == infra]
        on_demand = [offer for offer in of_cloud if offer.usd_per_h is not None]
        spot = [offer for offer in of_cloud if offer.spot_usd_per_h is not None]
        if on_demand and request.spot is not True:
            cheapest = min(on_demand, key=lambda offer: _region_order(offer, offer.usd_per_h))
            yield _on_demand(shape, cheapest, sized)
        if spot and request.spot is not False:
            cheapest = min(spot, key=lambda offer: _region_order(offer, offer.spot_usd_per_h))
            yield _on_spot(shape, cheapest, sized, regions=len({offer.region for offer in spot}))


def _region_order(offer: Offer, usd_per_h: float | None) -> tuple[float, bool, str]:
    """Return the sort key of regions: by price, and at equal prices US regions first, which have the most GPUs."""
    return usd_per_h or 0.0, not offer.region.startswith("us-"), offer.region


def _on_demand(shape: Shape, offer: Offer, sized: _Sized) -> PlanRow:
    usd_per_h = (offer.usd_per_h or 0.0) * shape.nodes
    return PlanRow(
        offer=offer,
        shape=shape,
        spot=False,
        fit=sized.fit,
        estimate=sized.estimate,
        expectation=None,
        usd_per_h=usd_per_h,
        hours=sized.estimate.hours,
        usd=usd_per_h * sized.estimate.hours,
        save_steps=None,
    )


def _on_spot(shape: Shape, offer: Offer, sized: _Sized, *, regions: int) -> PlanRow:
    """Return the spot option; more regions shorten the wait, because a recovery looks in all of them."""
    statistics = market(offer.infra, shape.accelerator, count=shape.count, zones=regions)
    time = sized.estimate
    expected = spot_expectation(
        work_h=time.work_s / 3600,
        save_s=time.save_s,
        restore_s=time.restore_s,
        provision_h=statistics.provision_h,
        preemptions_per_h=statistics.preemptions_per_h,
        upload_s=time.upload_s,
        load_s=time.load_s,
        # The step that runs when the notice arrives is finished first.
        notice_s=max(0.0, NOTICE_S.get(offer.infra, 0.0) - time.step_s),
    )
    usd_per_h = (offer.spot_usd_per_h or 0.0) * shape.nodes
    return PlanRow(
        offer=offer,
        shape=shape,
        spot=True,
        fit=sized.fit,
        estimate=time,
        expectation=expected.model_copy(update={"why": f"{expected.why} ({statistics.source})"}),
        usd_per_h=usd_per_h,
        hours=expected.hours,
        usd=usd_per_h * expected.paid_hours,
        save_steps=save_steps(expected.interval_s, step_s=time.step_s, total_steps=time.steps),
    )


def _apply_limits(rows: Sequence[PlanRow], request: PlanRequest) -> tuple[list[PlanRow], list[Rejected]]:
    """Return the rows within budget and deadline, and the others as rejections."""
    reasons = [_limit_reason(row, request) for row in rows]
    over = [row for row, why in zip(rows, reasons, strict=True) if why]
    way_out = _suggest_limits(over, request) if over else None
    rejected = [
        Rejected(what=row.describe(), why=why, way_out=way_out, fits=True)
        for row, why in zip(rows, reasons, strict=True)
        if why
    ]
    return [row for row, why in zip(rows, reasons, strict=True) if not why], rejected


def _limit_reason(row: PlanRow, request: PlanRequest) -> str:
    """Return which limits the row exceeds, and by how much; empty if it exceeds none."""
    reasons: list[str] = []
    if request.budget_usd is not None and row.usd > request.budget_usd:
        reasons.append(f"${row.usd:,.0f} expected, over the budget of ${request.budget_usd:,.0f}")
    if request.deadline_h is not None and row.hours > request.deadline_h:
        reasons.append(f"{row.hours:.1f} h expected, past the deadline of {request.deadline_h:g} h")
    return "; ".join(reasons)


def _suggest_limits(over: Iterable[PlanRow], request: PlanRequest) -> str:
    """Return the limits that would allow the nearest option; it raises one of two limits if that is enough."""

    def distance(row: PlanRow) -> tuple[int, float, float]:
        over_budget = request.budget_usd is not None and row.usd > request.budget_usd
        too_slow = request.deadline_h is not None and row.hours > request.deadline_h
        return over_budget + too_slow, row.usd if over_budget else 0.0, row.hours

    nearest = min(over, key=distance)
    options = []
    if request.budget_usd is not None and nearest.usd > request.budget_usd:
        options.append(f"--budget {math.ceil(nearest.usd)}")
    if request.deadline_h is not None and nearest.hours > request.deadline_h:
        options.append(f"--deadline {math.ceil(10 * nearest.hours) / 10:g}h")
    return f"`{' '.join(options)}` would allow {nearest.describe()}"


def _key(row: PlanRow, by: By) -> tuple[float, float, str]:
    first, second = (row.usd, row.hours) if by == "dollars" else (row.hours, row.usd)
    return first, second, row.describe()


def _why(rows: Sequence[PlanRow], request: PlanRequest, over_limit: Sequence[Rejected]) -> str:
    if not rows and over_limit:
        return f"all {len(over_limit)} options that fit are over the budget or the deadline"
    if not rows:
        return "no machine that can be rented fits"
    best = rows[0]
    criterion = "the shortest expected time" if request.by == "hours" else "the lowest expected cost"
    reason = f"{criterion} of {len(rows)} options" if len(rows) > 1 else "the only option that fits"
    parts = [f"{best.describe()}: {reason}"]
    if best.expectation:
        parts.append(best.expectation.why)
    other = next((row for row in rows[1:] if row.spot != best.spot), None)
    if other:
        kind = "spot" if other.spot else "on demand"
        parts.append(f"best {kind}: {other.describe()}, ${other.usd:,.0f} in {other.hours:.1f} h")
    return "; ".join(parts)


def _describe(shape: Shape, offers: Sequence[Offer]) -> str:
    types = sorted({f"{offer.infra} {offer.instance_type}" for offer in offers})
    return f"{shape} ({', '.join(types)})"

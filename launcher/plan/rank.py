"""What a recipe takes on everything that can be rented: ranked, with every rejection's reason; no I/O."""

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
"""Seconds between the notice and the loss of a spot machine; none elsewhere.
https://cloud.google.com/compute/docs/instances/spot,
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
https://learn.microsoft.com/azure/virtual-machines/spot-vms"""
ARM = ("GH200", "GB200")
"""GPUs on boards with Arm cores (Grace): our image and its wheels are for x86-64. Rejected unless they are named.
https://www.nvidia.com/en-us/data-center/grace-hopper-superchip"""
ON_ARM = "its cores are Arm, and the image is for x86-64; `--gpus` names it all the same"
By = Literal["dollars", "hours"]


class PlanRequest(BaseModel):
    """What the user said of where, and of how much it may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accelerator: str | None = None
    """SkyPilot's name; None takes any."""
    count: int | None = Field(default=None, ge=1)
    """GPUs of a node."""
    nodes: int = Field(default=1, ge=1)
    spot: bool | None = None
    """Only spot, only on demand, or both."""
    budget_usd: float | None = Field(default=None, gt=0)
    deadline_h: float | None = Field(default=None, gt=0)
    by: By = "dollars"


class PlanRow(BaseModel):
    """One way to run: what, where, and what it is expected to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offer: Offer
    """In the cheapest region."""
    shape: Shape
    """The offer's, times the nodes."""
    spot: bool
    fit: Fit
    estimate: Estimate
    expectation: SpotOutlook | None
    """What preemptions make of it; None on demand."""
    usd_per_h: float
    """Of all nodes."""
    hours: float
    """Expected, from the first request to the end."""
    usd: float
    """Expected; waiting for a machine is not paid."""
    save_steps: int | None
    """The interval between checkpoints that loses least; None on demand, where the recipe's stands."""

    def names(self) -> str:
        """`A100-80GB:8 spot on gcp (a2-ultragpu-8g, us-central1)`."""
        kind = "spot" if self.spot else "on demand"
        return f"{self.shape} {kind} on {self.offer.infra} ({self.offer.instance_type}, {self.offer.region})"


class Rejected(BaseModel):
    """What was looked at and is not in the table, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    why: str
    way_out: str | None = None
    fits: bool = False
    """Whether it would do, had it not been for the budget or the deadline."""


class Plan(BaseModel):
    """Ranked rows, the best first; that one is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    workload: Workload
    rows: tuple[PlanRow, ...]
    rejected: tuple[Rejected, ...]
    why: str
    """Of the choice."""
    prices: str
    """Where the prices are from, and of when."""
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> PlanRow | None:
        return self.rows[0] if self.rows else None


class _Sized(NamedTuple):
    """What a shape makes of a recipe; the same in every region."""

    fit: Fit
    estimate: Estimate


def parse_gpus(text: str) -> tuple[str, int | None]:
    """Name and count of `A100:8`, or of `A100`, which leaves the count open.

    Raises:
        UserError: no such GPU, or no count.
    """
    name, colon, count = text.partition(":")
    if colon and not (count.isdecimal() and int(count)):
        raise UserError(
            f"`--gpus {text}`: {count!r} is no number of GPUs",
            hint="as in `A100:8`, or `A100` for any number",
        )
    return gpu(name.strip()).name, int(count) if colon else None


def plan(
    recipe: Recipe,
    architecture: Architecture | None,
    prices: Prices,
    workload: Workload,
    wishes: PlanRequest | None = None,
) -> Plan:
    """Everything that could run the recipe, ranked by expected dollars or hours.

    Raises:
        UserError: nobody rents what was asked for.
    """
    asked = wishes or PlanRequest()
    if not prices.offers:
        raise UserError(
            "nothing is rented where you asked" + "".join(f"; {note}" for note in prices.notes),
            hint="name a cloud with `--infra`, or leave it out",
        )
    offers = _asked_for(prices.offers, asked)
    rejected: list[Rejected] = []
    rows: list[PlanRow] = []
    for shape, same in _by_shape(offers, asked.nodes).items():
        if shape.accelerator in ARM and asked.accelerator is None:
            rejected.append(
                Rejected(what=_whose(shape, same), why=ON_ARM, way_out=f"--gpus {shape.accelerator}")
            )
            continue
        sized = _size(recipe, architecture, shape, workload)
        if isinstance(sized, NoFit):
            rejected.append(Rejected(what=_whose(shape, same), why=sized.message, way_out=sized.hint))
        else:
            rows += _rows(shape, same, sized, asked)
    rows.sort(key=lambda row: _key(row, asked.by))
    judged = [(row, _over(row, asked)) for row in rows]
    fitting = [row for row, why in judged if not why]
    over = [row for row, why in judged if why]
    refused = [
        Rejected(what=row.names(), why=why, way_out=_more(over, asked), fits=True)
        for row, why in judged
        if why
    ]
    return Plan(
        recipe=recipe.name,
        workload=workload,
        rows=tuple(fitting),
        rejected=(*rejected, *refused) if fitting else (*refused, *rejected),
        why=_why(fitting, asked, refused),
        prices=f"{prices.source}, {prices.as_of.isoformat()}",
        notes=prices.notes,
    )


def _asked_for(offers: Sequence[Offer], wishes: PlanRequest) -> list[Offer]:
    """Offers of the GPUs that were named; at least one."""
    named = [offer for offer in offers if wishes.accelerator in (None, offer.shape.accelerator)]
    if not named:
        rented = sorted({offer.shape.accelerator or "" for offer in offers})
        near = difflib.get_close_matches(wishes.accelerator or "", rented, n=3, cutoff=0.4) or rented
        raise UserError(
            f"nobody here rents {wishes.accelerator}",
            hint=f"to be had: {', '.join(near)}",
        )
    counted = [offer for offer in named if wishes.count in (None, offer.shape.count)]
    if not counted:
        counts = ", ".join(str(count) for count in sorted({offer.shape.count for offer in named}))
        raise UserError(
            f"nobody here rents {wishes.count} x {wishes.accelerator} in one machine",
            hint=f"to be had are {counts}: `--gpus {wishes.accelerator}:N`",
        )
    return _on_market(counted, wishes)


def _on_market(offers: list[Offer], wishes: PlanRequest) -> list[Offer]:
    """Those of the market that was named; at least one."""
    if wishes.spot is None:
        return offers
    found = [each for each in offers if (each.spot_usd_per_h if wishes.spot else each.usd_per_h) is not None]
    if not found:
        wanted = "spot" if wishes.spot else "on demand"
        raise UserError(
            f"{', '.join(sorted({each.infra for each in offers}))} rents no {wishes.accelerator or 'GPUs'} {wanted}",
            hint=f"leave `--{wanted.replace(' ', '-')}` out, or name other clouds with `--infra`",
        )
    return found


def _by_shape(offers: Iterable[Offer], nodes: int) -> dict[Shape, list[Offer]]:
    """Offers that make the same of a recipe: one instance type, wherever it stands."""
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
    assert architecture is not None  # noqa: S101 - without it nothing fits a GPU
    return _Sized(chosen, estimate(recipe, architecture, chosen, shape, workload))


def _rows(shape: Shape, offers: Sequence[Offer], sized: _Sized, wishes: PlanRequest) -> Iterator[PlanRow]:
    """At most two for each cloud: on demand and spot, each in its cheapest region."""
    for infra in dict.fromkeys(offer.infra for offer in offers):
        here = [offer for offer in offers if offer.infra == infra]
        on_demand = [offer for offer in here if offer.usd_per_h is not None]
        spot = [offer for offer in here if offer.spot_usd_per_h is not None]
        if on_demand and wishes.spot is not True:
            yield _on_demand(shape, min(on_demand, key=lambda offer: _dear(offer, offer.usd_per_h)), sized)
        if spot and wishes.spot is not False:
            cheapest = min(spot, key=lambda offer: _dear(offer, offer.spot_usd_per_h))
            yield _on_spot(shape, cheapest, sized, regions=len({offer.region for offer in spot}))


def _dear(offer: Offer, usd_per_h: float | None) -> tuple[float, bool, str]:
    """Of regions at one price the American come first: most of the clouds' GPUs are there."""
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
    """A recovery looks for a machine in all regions, so one waits less where there are more."""
    known = market(offer.infra, shape.accelerator, count=shape.count, zones=regions)
    time = sized.estimate
    expected = spot_expectation(
        work_h=time.work_s / 3600,
        save_s=time.save_s,
        restore_s=time.restore_s,
        provision_h=known.provision_h,
        preemptions_per_h=known.preemptions_per_h,
        upload_s=time.upload_s,
        load_s=time.load_s,
        notice_s=max(
            0.0, NOTICE_S.get(offer.infra, 0.0) - time.step_s
        ),  # the step that it comes in ends first
    )
    usd_per_h = (offer.spot_usd_per_h or 0.0) * shape.nodes
    return PlanRow(
        offer=offer,
        shape=shape,
        spot=True,
        fit=sized.fit,
        estimate=time,
        expectation=expected.model_copy(update={"why": f"{expected.why} ({known.source})"}),
        usd_per_h=usd_per_h,
        hours=expected.hours,
        usd=usd_per_h * expected.paid_hours,
        save_steps=save_steps(expected.interval_s, step_s=time.step_s, total_steps=time.steps),
    )


def _over(row: PlanRow, wishes: PlanRequest) -> str:
    """Why the budget or the deadline forbids it; empty: they do not."""
    over: list[str] = []
    if wishes.budget_usd is not None and row.usd > wishes.budget_usd:
        over.append(f"${row.usd:,.0f} expected, over the budget of ${wishes.budget_usd:,.0f}")
    if wishes.deadline_h is not None and row.hours > wishes.deadline_h:
        over.append(f"{row.hours:.1f} h expected, past the deadline of {wishes.deadline_h:g} h")
    return "; ".join(over)


def _more(over: Iterable[PlanRow], wishes: PlanRequest) -> str:
    """The limits that would let the nearest one run: of two that are given, only one is raised if that is enough."""

    def raised(row: PlanRow) -> tuple[int, float, float]:
        dear = wishes.budget_usd is not None and row.usd > wishes.budget_usd
        slow = wishes.deadline_h is not None and row.hours > wishes.deadline_h
        return dear + slow, row.usd if dear else 0.0, row.hours

    least = min(over, key=raised)
    words = []
    if wishes.budget_usd is not None and least.usd > wishes.budget_usd:
        words.append(f"--budget {math.ceil(least.usd)}")
    if wishes.deadline_h is not None and least.hours > wishes.deadline_h:
        words.append(f"--deadline {math.ceil(10 * least.hours) / 10:g}h")
    return f"`{' '.join(words)}` would do for {least.names()}"


def _key(row: PlanRow, by: By) -> tuple[float, float, str]:
    first, second = (row.usd, row.hours) if by == "dollars" else (row.hours, row.usd)
    return first, second, row.names()


def _why(rows: Sequence[PlanRow], wishes: PlanRequest, refused: Sequence[Rejected]) -> str:
    if not rows and refused:
        return f"all {len(refused)} that fit are too dear or too slow"
    if not rows:
        return "nothing that can be rented will do"
    best = rows[0]
    least = "the fewest expected hours" if wishes.by == "hours" else "the fewest expected dollars"
    said = [
        f"{best.names()}: {least} of {len(rows)} that fit"
        if len(rows) > 1
        else f"{best.names()}: all that fits"
    ]
    if best.expectation:
        said.append(best.expectation.why)
    other = next((row for row in rows[1:] if row.spot != best.spot), None)
    if other:
        said.append(
            f"next {'spot' if other.spot else 'on demand'}: {other.names()}, ${other.usd:,.0f} in {other.hours:.1f} h"
        )
    return "; ".join(said)


def _whose(shape: Shape, offers: Sequence[Offer]) -> str:
    types = sorted({f"{offer.infra} {offer.instance_type}" for offer in offers})
    return f"{shape} ({', '.join(types)})"

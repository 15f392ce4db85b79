"""The account of a run: dollars, hours, lost steps and memory, by attempt and in all, with the plan's predictions."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import add
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError

from launcher.runs.run import AttemptHistory, RunHistory
from launcher.runs.time_breakdown import TimeBreakdown, count, hours, total, useful_until
from trainer.events import of_kind
from trainer.metrics import TEST_PREFIX

RUNNING = "running"
ENDS = {
    "done": "done",
    "preempted": "preempted",
    "failed": "failed",
    "superseded": "superseded",
    "stopped": "stopped at its limit",
}
"""Texts for the kinds of events that end an attempt."""


@dataclass(frozen=True)
class Memory:
    """The peak memory of a GPU or of a host, GiB; None for unknown values."""

    predicted_gib: float | None
    measured_gib: float | None
    there_gib: float | None
    """Capacity."""
    terms: tuple[tuple[str, float], ...] = ()
    """Terms of the prediction, largest first."""


@dataclass(frozen=True)
class AttemptAccount:
    """The account of one attempt."""

    number: int
    node: str
    shape: str
    fit: str
    cloud: str | None
    region: str | None
    market: str | None
    usd_per_h: float | None
    usd: float | None
    began: str
    """Start of the paid time: `hours.boot_s` before the claim. UTC, ISO 8601."""
    ended: str
    """Time of the latest event, or now for a running attempt. UTC, ISO 8601."""
    how: str
    """How it ended: a text of `ENDS`, `running`, or `lost` for a machine that vanished."""
    message: str
    waited_s: float
    """Seconds from the latest event of the previous attempt to the start of this one; 0 for the first."""
    start_step: int
    last_step: int
    lost_steps: int
    hours: TimeBreakdown
    step_s: float | None
    """Median over the steps."""
    tokens_per_s: float | None
    """Median over the steps, of all GPUs together."""
    commits: int
    uploaded_bytes: float
    upload_s: float
    """Sum over all uploads, most of which overlap training."""
    gpu: Memory
    host: Memory

    @property
    def where(self) -> str:
        """`gcp/us-central1`, or the node's name."""
        return "/".join(filter(None, (self.cloud, self.region))) or self.node


@dataclass(frozen=True)
class Account:
    """The account of a run over all its attempts."""

    run: str
    uri: str
    state: str
    method: str
    recipe: str
    step: int
    total_steps: int | None
    wall_s: float
    """Seconds from the start of the first attempt's paid time to the latest event."""
    provisioning_s: float
    """Seconds between attempts, without a machine."""
    lost_steps: int
    hours: TimeBreakdown
    goodput: float | None
    usd: float | None
    spot_usd: float
    on_demand_usd: float
    unpriced_s: float
    upload_s: float
    uploaded_bytes: float
    commits: int
    plan: dict[str, Any] | None
    """Predictions of `plan`: hours, usd, usd_per_h, market, gpu_gib, host_gib, step_s."""
    limits: dict[str, Any] | None
    """The newest attempt's limits: budget_usd, deadline_h."""
    attempts: tuple[AttemptAccount, ...]
    loss: float | None
    test: dict[str, float]
    """The metrics of the last evaluation."""

    def as_dict(self) -> dict[str, Any]:
        """Return the account for JSON output; the keys name the units."""
        return asdict(self)


def account(run: RunHistory, *, now: float | None = None) -> Account:
    """Return the account of a run.

    Args:
        run: its history.
        now: unix time, seconds, if the newest attempt is running.
    """
    newest = run.attempts[-1].number if run.attempts else 0
    # Only the newest attempt can be running; the others are paid up to their latest event.
    attempts = tuple(
        _attempt(run, attempt, until=now if attempt.number == newest else None) for attempt in run.attempts
    )
    cost = run.cost(now=now)
    spent = reduce(add, (one.hours for one in attempts), TimeBreakdown())
    # A run has the plan of its first submission; later ones may have been submitted without one.
    plans = [attempt.claim["plan"] for attempt in run.attempts if attempt.claim.get("plan")]
    last = run.steps[-1] if run.steps else {}
    return Account(
        run=run.run_id,
        uri=run.uri,
        state=run.state,
        method=run.method,
        recipe=str(run.attempts[-1].claim.get("recipe", "")) if run.attempts else "",
        step=run.step,
        total_steps=run.total_steps,
        wall_s=cost.seconds + sum(one.waited_s for one in attempts),
        provisioning_s=sum(one.waited_s for one in attempts),
        lost_steps=sum(one.lost_steps for one in attempts),
        hours=spent,
        goodput=spent.goodput,
        usd=cost.usd,
        spot_usd=cost.spot_usd,
        on_demand_usd=cost.on_demand_usd,
        unpriced_s=cost.unpriced_s,
        upload_s=sum(one.upload_s for one in attempts),
        uploaded_bytes=sum(one.uploaded_bytes for one in attempts),
        commits=len(run.commits),
        plan=dict(plans[0]) if plans else None,
        limits=run.attempts[-1].claim.get("limits") if run.attempts else None,
        attempts=attempts,
        loss=last.get("loss"),
        test={
            key: value
            for key, value in (run.evals[-1] if run.evals else {}).items()
            if key.startswith(TEST_PREFIX)
        },
    )


def ending(run: RunHistory, attempt: AttemptHistory) -> str:
    """Return how an attempt ended, or that it is running; an older attempt without an end event is lost."""
    if attempt.end:
        return str(ENDS.get(attempt.end["kind"], attempt.end["kind"]))
    if attempt is not run.attempts[-1]:
        return "lost"
    return "done" if run.finished else RUNNING


def _attempt(run: RunHistory, attempt: AttemptHistory, *, until: float | None) -> AttemptAccount:
    # The steps that count as lost, and the wait before the attempt, depend on the other attempts of the run.
    earlier = [other for other in run.attempts if other.number < attempt.number]
    claim, cost = attempt.claim, attempt.cost(until)
    began = attempt.began - attempt.boot_s
    price = claim.get("price") or {}
    end = attempt.end or {}
    return AttemptAccount(
        number=attempt.number,
        node=str(claim.get("shape", {}).get("node", "")),
        shape=_shape(claim),
        fit=_fit(claim),
        cloud=price.get("cloud"),
        region=price.get("region"),
        market=cost.market,
        usd_per_h=cost.usd_per_h,
        usd=cost.usd,
        began=_iso(began),
        ended=_iso(attempt.ended if until is None else until),
        how=ending(run, attempt),
        message=str(end.get("message", "")),
        waited_s=max(0.0, began - earlier[-1].ended) if earlier else 0.0,
        start_step=attempt.start,
        last_step=attempt.step,
        lost_steps=attempt.step - useful_until(run, attempt),
        hours=hours(run, attempt, until=until),
        step_s=_median(attempt, "step_s") or attempt.step_s or None,
        tokens_per_s=_median(attempt, "tokens_per_s"),
        commits=count(attempt, "committed"),
        uploaded_bytes=total(attempt, "committed", "bytes") + total(attempt, "exported", "bytes"),
        upload_s=total(attempt, "committed", "seconds") + total(attempt, "exported", "seconds"),
        gpu=_memory(attempt, "gpu"),
        host=_memory(attempt, "host"),
    )


def _memory(attempt: AttemptHistory, device: Literal["gpu", "host"]) -> Memory:
    claim = attempt.claim
    terms = [
        (str(term["name"]), float(term["gib"]))
        for term in claim.get("fit", {}).get(device, {}).get("terms", [])
    ]
    peaks = [
        event[f"{device}_peak_gib"]
        for event in of_kind(attempt.events, "step")
        if event.get(f"{device}_peak_gib")
    ]
    shape = claim.get("shape", {})
    return Memory(
        predicted_gib=sum(gib for _, gib in terms) or None,
        measured_gib=max(peaks, default=None),
        there_gib=shape.get("memory_gib" if device == "gpu" else "host_memory_gib"),
        terms=tuple(sorted(terms, key=lambda term: -term[1])),
    )


def _median(attempt: AttemptHistory, key: str) -> float | None:
    numbers = [float(event[key]) for event in of_kind(attempt.events, "step") if event.get(key)]
    return median(numbers) if numbers else None


def _shape(claim: dict[str, Any]) -> str:
    from trainer.hardware import Shape

    with suppress(ValidationError):  # a claim of another version may have other fields
        return str(Shape.model_validate(claim.get("shape")))
    return ""


def _fit(claim: dict[str, Any]) -> str:
    from trainer.fit import Fit

    with suppress(ValidationError):
        return str(Fit.model_validate(claim.get("fit")).words())
    return ""


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")

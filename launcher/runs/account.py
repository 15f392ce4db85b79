"""What a run came to, as numbers: dollars and hours by attempt and in all, what was lost, memory; against the plan."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import add
from statistics import median
from typing import Any

from pydantic import ValidationError

from launcher.runs.run import AttemptHistory, RunHistory
from launcher.runs.time_breakdown import TimeBreakdown, count, hours, total, useful_until
from trainer.events import of_kind
from trainer.metrics import TEST_PREFIX

WORDS = {
    "done": "done",
    "preempted": "preempted",
    "failed": "failed",
    "superseded": "superseded",
    "stopped": "stopped at its limit",
}
"""How an attempt ended, by its last event."""


@dataclass(frozen=True)
class Memory:
    """The peak of a GPU or of a host, GiB; None for what is not known."""

    predicted_gib: float | None
    measured_gib: float | None
    there_gib: float | None
    terms: tuple[tuple[str, float], ...] = ()
    """Of the prediction, the largest first."""


@dataclass(frozen=True)
class AttemptAccount:
    """One attempt."""

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
    """From when on it is paid: `hours.boot_s` before its claim. UTC, ISO 8601; so is `ended`, the last that was heard
    of it."""
    ended: str
    how: str
    """How it ended, in a word or two; `at work`, or `lost` for a machine that vanished."""
    message: str
    waited_s: float
    """From the last that was heard of the attempt before until it began; 0 for the first."""
    start_step: int
    last_step: int
    lost_steps: int
    hours: TimeBreakdown
    step_s: float | None
    """Median."""
    tokens_per_s: float | None
    """Median, over all GPUs."""
    commits: int
    uploaded_bytes: float
    upload_s: float
    """Of all uploads; most of them while training went on."""
    gpu: Memory
    host: Memory

    @property
    def where(self) -> str:
        """`gcp/us-central1`, or the node's name."""
        return "/".join(filter(None, (self.cloud, self.region))) or self.node


@dataclass(frozen=True)
class Account:
    """A run over all its attempts."""

    run: str
    uri: str
    state: str
    method: str
    recipe: str
    step: int
    total_steps: int | None
    wall_s: float
    """From when on the first attempt is paid to the last event."""
    provisioning_s: float
    """Between attempts: nobody had a machine."""
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
    """What `plan` promised: hours, usd, usd_per_h, market, gpu_gib, host_gib, step_s."""
    limits: dict[str, Any] | None
    """What it may take at most: budget_usd, deadline_h; as the newest attempt was told."""
    attempts: tuple[AttemptAccount, ...]
    loss: float | None
    test: dict[str, float]
    """The metrics of the last evaluation."""

    def as_dict(self) -> dict[str, Any]:
        """For programs; seconds, dollars, bytes and GiB as the names say."""
        return asdict(self)


def account(run: RunHistory, *, now: float | None = None) -> Account:
    """All that the bucket tells of what a run took.

    Args:
        run: as its bucket tells it.
        now: unix time, seconds, if its newest attempt is at work.
    """
    newest = run.attempts[-1].number if run.attempts else 0
    each = tuple(
        _attempt(run, attempt, until=now if attempt.number == newest else None) for attempt in run.attempts
    )
    cost = run.cost(now=now)
    spent = reduce(add, (one.hours for one in each), TimeBreakdown())
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
        wall_s=cost.seconds + sum(one.waited_s for one in each),
        provisioning_s=sum(one.waited_s for one in each),
        lost_steps=sum(one.lost_steps for one in each),
        hours=spent,
        goodput=spent.goodput,
        usd=cost.usd,
        spot_usd=cost.spot_usd,
        on_demand_usd=cost.on_demand_usd,
        unpriced_s=cost.unpriced_s,
        upload_s=sum(one.upload_s for one in each),
        uploaded_bytes=sum(one.uploaded_bytes for one in each),
        commits=len(run.commits),
        plan=dict(plans[0]) if plans else None,
        limits=run.attempts[-1].claim.get("limits") if run.attempts else None,
        attempts=each,
        loss=last.get("loss"),
        test={
            key: value
            for key, value in (run.evals[-1] if run.evals else {}).items()
            if key.startswith(TEST_PREFIX)
        },
    )


def _attempt(run: RunHistory, attempt: AttemptHistory, *, until: float | None) -> AttemptAccount:
    before = [each for each in run.attempts if each.number < attempt.number]
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
        how=how(run, attempt),
        message=str(end.get("message", "")),
        waited_s=max(0.0, began - before[-1].ended) if before else 0.0,
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


def how(run: RunHistory, attempt: AttemptHistory) -> str:
    """How an attempt ended; a machine that vanished could not say."""
    if attempt.end:
        return str(WORDS.get(attempt.end["kind"], attempt.end["kind"]))
    if attempt is not run.attempts[-1]:
        return "lost"
    return "done" if run.finished else "at work"


def _memory(attempt: AttemptHistory, of: str) -> Memory:
    claim = attempt.claim
    terms = [
        (str(term["name"]), float(term["gib"])) for term in claim.get("fit", {}).get(of, {}).get("terms", [])
    ]
    peaks = [
        event[f"{of}_peak_gib"] for event in of_kind(attempt.events, "step") if event.get(f"{of}_peak_gib")
    ]
    shape = claim.get("shape", {})
    return Memory(
        predicted_gib=sum(gib for _, gib in terms) or None,
        measured_gib=max(peaks, default=None),
        there_gib=shape.get("memory_gib" if of == "gpu" else "host_memory_gib"),
        terms=tuple(sorted(terms, key=lambda each: -each[1])),
    )


def _median(attempt: AttemptHistory, key: str) -> float | None:
    numbers = [float(event[key]) for event in of_kind(attempt.events, "step") if event.get(key)]
    return median(numbers) if numbers else None


def _shape(claim: dict[str, Any]) -> str:
    from trainer.hardware import Shape

    with suppress(ValidationError):  # of another version
        return str(Shape.model_validate(claim.get("shape")))
    return ""


def _fit(claim: dict[str, Any]) -> str:
    from trainer.fit import Fit

    with suppress(ValidationError):
        return str(Fit.model_validate(claim.get("fit")).words())
    return ""


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")

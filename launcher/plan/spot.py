"""Spot or not: expected hours of a run that may lose its machine, and how often to save.

Preemptions are taken as memoryless: a machine that is held is lost at a constant rate. A run saves every interval;
the save stops training for a moment and is uploaded beside it, so that it counts only when it is committed. A loss
goes back to the newest committed checkpoint, and a machine must first be had, loaded and restored. For this the
expectation is exact (Daly 2006, https://doi.org/10.1016/j.future.2004.11.016, its complete model, with the upload's
lag added to the restart, which the same argument gives):

    held = (e^(rate x (interval + save)) - 1) x e^(rate x (restart + upload)) / rate     for each interval of work

Real preemptions come in bursts; `bench/spot.md` shows what that does to the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

HOUR_S = 3600.0
UPLOAD_SHARE = 0.5
"""Of the time between saves, at most: a bucket twice as slow as thought still takes every save."""
LEAST_INTERVAL_S = 60.0
LONGEST_INTERVAL_S = 2 * HOUR_S
"""Also on machines that are never lost: software fails too, and people look at checkpoints."""
LEAST_PER_H = 1e-9
"""Below it a preemption is one in more than a hundred thousand years."""
LARGEST_EXPONENT = 200.0
"""e^200 hours is never."""


class Market(BaseModel):
    """How long spot machines last and how long one waits for the next: measured, or taken from elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preemptions_per_h: float
    """While a machine is held."""
    provision_h: float
    """Mean wait for a machine."""
    source: str


TRACES = "https://github.com/skypilot-org/spot-traces"
POOLED_PER_H, ONE_ZONE_WAIT_H = 0.30, 2.2
"""One V100 on AWS, 5 traces of 2023 in 5 zones: 656 losses in 2161 hours held, from 0.16 to 1.4 an hour; 1472 hours of
waiting (`bench/spot.md`). The data of "Can't Be Late" (Wu et al., NSDI 2024)."""
MARKETS: Mapping[tuple[str, str], tuple[float, float]] = {
    ("aws", "V100"): (POOLED_PER_H, ONE_ZONE_WAIT_H),
    ("aws", "V100:8"): (0.86, 1.26),
    ("gcp", "None"): (0.022, 0.01),
}
"""Losses an hour and wait in one zone: p3.2xlarge; p3.16xlarge in us-west-2a, 27 days of 2022; c3-highcpu-88, two
days of 2023, never lost but at the seam."""


def market(infra: str, accelerator: str | None, *, count: int = 1, zones: int = 1) -> Market:
    """What is known of a cloud's spot machines; where nothing is, the pooled V100s, and it says so.

    Several zones shorten the wait in proportion, as if each became free on its own. Several nodes are taken to be lost
    together: four V100s of one zone were lost 0.12 times an hour, less often than single ones (same traces).
    """
    for name in (f"{accelerator}:{count}", str(accelerator)):
        if found := MARKETS.get((infra, name)):
            return Market(
                preemptions_per_h=found[0], provision_h=found[1] / zones, source=f"measured: {TRACES}"
            )
    return Market(
        preemptions_per_h=POOLED_PER_H,
        provision_h=ONE_ZONE_WAIT_H / zones,
        source=f"nobody has published {accelerator} on {infra}; V100s on AWS: {TRACES}",
    )


class SpotOutlook(BaseModel):
    """What a run on spot is expected to take; `inf` where it never ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hours: float
    """From the first request to the end, waiting for machines included."""
    paid_hours: float
    """That a machine was held; waiting for one is not paid."""
    preemptions: float
    interval_s: float
    """Of work between saves."""
    lost_h: float
    """Work done twice, starts and saves that came to nothing."""
    saving_h: float
    """Training stood still for saves, and the last upload."""
    starting_h: float
    """Machines held while they load and restore."""
    waiting_h: float
    """No machine held."""
    why: str


class _Costs(NamedTuple):
    """Hours."""

    work: float
    interval: float
    save: float
    upload: float
    load: float
    restart: float
    rate: float


class _Held(NamedTuple):
    """Hours of a machine until the first commit, and after it."""

    first: float
    more: float

    @property
    def hours(self) -> float:
        return self.first + self.more


def spot_expectation(  # noqa: PLR0913 - a run, its checkpoints and its market
    *,
    work_h: float,
    save_s: float,
    restore_s: float,
    provision_h: float,
    preemptions_per_h: float,
    upload_s: float = 0.0,
    load_s: float = 0.0,
    notice_s: float = 0.0,
    interval_s: float | None = None,
) -> SpotOutlook:
    """Expected hours of a run.

    Args:
        work_h: of training, undisturbed, without saves and starts.
        save_s: that training stands still for each save.
        restore_s: to download and load a checkpoint, on top of `load_s`.
        provision_h: mean wait for a machine, not paid.
        preemptions_per_h: while a machine is held.
        upload_s: from a save until it is committed.
        load_s: on a held machine, before training: container, model, data.
        notice_s: warning of a preemption; counts only if it holds a save and its upload.
        interval_s: of work between saves; None takes the best.
    """
    if interval_s is None:
        interval_s = best_interval(
            save_s=save_s, upload_s=upload_s, preemptions_per_h=preemptions_per_h, work_h=work_h
        )
    costs = _Costs(
        work=work_h,
        interval=min(interval_s / HOUR_S, work_h),
        save=save_s / HOUR_S,
        upload=upload_s / HOUR_S,
        load=load_s / HOUR_S,
        restart=(load_s + restore_s) / HOUR_S,
        rate=preemptions_per_h if preemptions_per_h > LEAST_PER_H else 0.0,
    )
    saved_in_time = 0 < save_s + upload_s <= notice_s
    held = _held_with_notice(costs) if saved_in_time else _held(costs)
    return _result(costs, held, provision_h=provision_h, saved_in_time=saved_in_time)


def best_interval(
    *, save_s: float, upload_s: float, preemptions_per_h: float, work_h: float = math.inf
) -> float:
    """Seconds of work between saves that make the expected hours least.

    Daly's higher-order estimate of the optimum (2006; its first term is Young's, 1974,
    https://doi.org/10.1145/361147.361115), which neither the restart nor the upload changes, and then as long as the
    upload needs. Never longer than the work.
    """
    least = max(LEAST_INTERVAL_S, upload_s / UPLOAD_SHARE - save_s)
    wanted = (
        daly(save_s=save_s, mean_s=HOUR_S / preemptions_per_h)
        if preemptions_per_h > LEAST_PER_H
        else math.inf
    )
    return max(min(max(wanted, least), LONGEST_INTERVAL_S, work_h * HOUR_S), 1.0)


def daly(*, save_s: float, mean_s: float) -> float:
    """The interval of work for a save and a mean time between losses (Daly 2006, the higher-order estimate)."""
    if save_s >= 2 * mean_s:
        return mean_s
    ratio = save_s / (2 * mean_s)
    return math.sqrt(2 * save_s * mean_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def save_steps(interval_s: float, *, step_s: float, total_steps: int) -> int:
    """The recipe's `save_steps` nearest an interval."""
    return max(1, min(total_steps, round(interval_s / step_s)))


def _held(costs: _Costs) -> _Held:
    """With every preemption going back to the last commit."""
    if not costs.rate:
        return _Held(costs.load + costs.work + _saves(costs) * costs.save + costs.upload, 0.0)
    whole, rest = _split(costs)
    first = costs.interval if whole else rest
    more = max(whole - 1, 0) * _segment(costs, costs.interval) + (
        _segment(costs, rest) if whole and rest else 0.0
    )
    return _Held(_uninterrupted(costs.load + first + costs.save + costs.upload, costs.rate), more)


def _held_with_notice(costs: _Costs) -> _Held:
    """With every preemption announced in time: only starts are paid twice."""
    busy = costs.work + _saves(costs) * costs.save + costs.upload
    first = _uninterrupted(costs.load, costs.rate) if costs.rate else costs.load
    return _Held(first, busy * _power(costs.rate * costs.restart))


def _segment(costs: _Costs, work: float) -> float:
    """From one commit to the next."""
    lag = _power(costs.rate * (costs.restart + costs.upload))
    return lag * _growth(costs.rate * (work + costs.save)) / costs.rate


def _uninterrupted(hours: float, rate: float) -> float:
    """Until so many hours pass without a preemption, starting over at each."""
    return _growth(rate * hours) / rate


def _power(exponent: float) -> float:
    return math.exp(exponent) if exponent < LARGEST_EXPONENT else math.inf


def _growth(exponent: float) -> float:
    """e^x - 1, exact also near 0."""
    return math.expm1(exponent) if exponent < LARGEST_EXPONENT else math.inf


def _split(costs: _Costs) -> tuple[int, float]:
    """Whole intervals, and what is left of the work."""
    whole = math.floor(costs.work / costs.interval + 1e-9) if costs.interval else 0
    rest = costs.work - whole * costs.interval
    return whole, rest if rest > 1e-9 * costs.work else 0.0


def _saves(costs: _Costs) -> int:
    whole, rest = _split(costs)
    return whole + (rest > 0)


def _result(costs: _Costs, held: _Held, *, provision_h: float, saved_in_time: bool) -> SpotOutlook:
    preemptions = costs.rate * held.hours
    saving = _saves(costs) * costs.save + costs.upload
    starting = (1 + costs.rate * held.first) * _start(costs.load, costs.rate)
    starting += costs.rate * held.more * _start(costs.restart, costs.rate)
    waiting = provision_h * (preemptions + 1)
    lost = held.hours - costs.work - saving - starting if math.isfinite(held.hours) else math.inf
    return SpotOutlook(
        hours=held.hours + waiting,
        paid_hours=held.hours,
        preemptions=preemptions,
        interval_s=costs.interval * HOUR_S,
        lost_h=max(0.0, lost),
        saving_h=saving,
        starting_h=starting,
        waiting_h=waiting,
        why=_why(costs, preemptions, lost, saved_in_time=saved_in_time),
    )


def _start(hours: float, rate: float) -> float:
    """Of a start, which may itself be cut short."""
    return -math.expm1(-rate * hours) / rate if rate else hours


def _why(costs: _Costs, preemptions: float, lost: float, *, saved_in_time: bool) -> str:
    if not costs.rate:
        return "no preemptions expected"
    kept = "each announced in time to save" if saved_in_time else f"{lost:.1f} h of work lost"
    return (
        f"{preemptions:.1f} preemptions expected, one in {1 / costs.rate:.1f} h; {kept}; "
        f"a save every {costs.interval * 60:.0f} min"
    )

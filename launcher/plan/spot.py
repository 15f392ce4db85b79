"""Spot machines: the expected hours of a run that is preempted at times, and the best interval between saves.

The model is memoryless: a held machine is preempted at a constant rate. A run saves at every interval. A save pauses
training briefly and is then uploaded in the background; it counts only when it is committed. After a preemption the run
waits for a machine, loads, restores the newest committed checkpoint and repeats the work since then. For this model the
expectation is exact (Daly 2006, https://doi.org/10.1016/j.future.2004.11.016, its complete model; the upload's delay is
added to the restart, by the same argument):

    held = (e^(rate x (interval + save)) - 1) x e^(rate x (restart + upload)) / rate     for each interval of work

Real preemptions come in bursts; `bench/spot.md` shows the effect on the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

HOUR_S = 3600.0
UPLOAD_SHARE = 0.5
"""Largest share of the time between saves that an upload takes; a bucket half as fast as expected then still keeps up."""
LEAST_INTERVAL_S = 60.0
LONGEST_INTERVAL_S = 2 * HOUR_S
"""Also without preemptions, because software fails too, and users look at checkpoints."""
LEAST_PER_H = 1e-9
"""Lower preemption rates count as zero: this is one in more than a hundred thousand years."""
LARGEST_EXPONENT = 200.0
"""Larger exponents give infinity: e^200 hours is never."""
TRACES = "https://github.com/skypilot-org/spot-traces"
POOLED_PER_H, ONE_ZONE_WAIT_H = 0.30, 2.2
"""Preemptions per hour and mean wait in hours of one V100 on AWS. From 5 traces of 2023 in 5 zones: 656 preemptions in
2161 held hours, between 0.16 and 1.4 per hour; 1472 hours of waiting (`bench/spot.md`). The data is that of "Can't Be
Late" (Wu et al., NSDI 2024)."""
MARKETS: Mapping[tuple[str, str], tuple[float, float]] = {
    ("aws", "V100"): (POOLED_PER_H, ONE_ZONE_WAIT_H),
    ("aws", "V100:8"): (0.86, 1.26),
    ("gcp", "None"): (0.022, 0.01),
}
"""Preemptions per hour and mean wait in hours in one zone, by cloud and GPU. They are of p3.2xlarge; of p3.16xlarge in
us-west-2a, 27 days of 2022; and of c3-highcpu-88, two days of 2023, preempted only at the seam of two recordings."""


class Market(BaseModel):
    """How often spot machines are preempted, and how long the wait for the next one is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preemptions_per_h: float
    """Rate while a machine is held."""
    provision_h: float
    """Mean wait for a machine."""
    source: str
    """The measurement behind the numbers."""


class SpotOutlook(BaseModel):
    """The expected hours of a run on spot; `inf` if it never ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hours: float
    """From the first request for a machine to the end, waits included."""
    paid_hours: float
    """Hours in which a machine is held; a wait costs nothing."""
    preemptions: float
    interval_s: float
    """Seconds of work between saves."""
    lost_h: float
    """Hours of work that is repeated, and of starts and saves that a preemption cut off."""
    saving_h: float
    """Hours in which training pauses for saves, and the last upload."""
    starting_h: float
    """Hours in which a held machine loads and restores."""
    waiting_h: float
    """Hours without a machine."""
    why: str


class _Costs(NamedTuple):
    """A run's durations in hours, and its preemptions per hour."""

    work: float
    interval: float
    save: float
    upload: float
    load: float
    restart: float
    rate: float


class _Held(NamedTuple):
    """Hours in which a machine is held: until the first commit, and after it."""

    first: float
    more: float

    @property
    def hours(self) -> float:
        return self.first + self.more


def market(infra: str, accelerator: str | None, *, count: int = 1, zones: int = 1) -> Market:
    """Return the preemption rate and the wait of a cloud's spot machines.

    If nobody has published a measurement, the numbers are those of all measured V100s together, and `source` says so. The
    wait is divided by the number of zones. This assumes that machines become free independently in each zone. The rate
    does not grow with the number of nodes, because the nodes of one zone are usually preempted together: in these
    traces, groups of four V100s were preempted 0.12 times per hour, less often than single V100s.
    """
    for name in (f"{accelerator}:{count}", str(accelerator)):
        if found := MARKETS.get((infra, name)):
            return Market(
                preemptions_per_h=found[0], provision_h=found[1] / zones, source=f"measured: {TRACES}"
            )
    return Market(
        preemptions_per_h=POOLED_PER_H,
        provision_h=ONE_ZONE_WAIT_H / zones,
        source=f"no published data for {accelerator} on {infra}; from V100s on AWS: {TRACES}",
    )


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
    """Return the expected hours of a run.

    Args:
        work_h: hours of training without interruptions, saves and starts.
        save_s: pause of training for each save.
        restore_s: download and load of a checkpoint, in addition to `load_s`.
        provision_h: mean wait for a machine, which costs nothing.
        preemptions_per_h: rate while a machine is held.
        upload_s: time from a save to its commit.
        load_s: time of a held machine before training starts: container, model, data.
        notice_s: warning before a preemption; it helps only if a save and its upload fit into it.
        interval_s: work between saves; None means the best interval.
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
    """Return the seconds of work between saves that minimise the expected hours.

    This is Daly's higher-order estimate of the optimum (2006; its first term is Young's, 1974,
    https://doi.org/10.1145/361147.361115). Restart and upload do not change it. The interval is longer if the upload
    needs it, and never longer than the work.
    """
    least = max(LEAST_INTERVAL_S, upload_s / UPLOAD_SHARE - save_s)
    optimum = (
        daly(save_s=save_s, mean_s=HOUR_S / preemptions_per_h)
        if preemptions_per_h > LEAST_PER_H
        else math.inf
    )
    return max(min(max(optimum, least), LONGEST_INTERVAL_S, work_h * HOUR_S), 1.0)


def daly(*, save_s: float, mean_s: float) -> float:
    """Return the best interval for a save's duration and a mean time between preemptions (Daly 2006, higher order)."""
    if save_s >= 2 * mean_s:
        return mean_s
    ratio = save_s / (2 * mean_s)
    return math.sqrt(2 * save_s * mean_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def save_steps(interval_s: float, *, step_s: float, total_steps: int) -> int:
    """Return the number of steps nearest to an interval, for the recipe's `save_steps`."""
    return max(1, min(total_steps, round(interval_s / step_s)))


def _held(costs: _Costs) -> _Held:
    """Return the held hours if every preemption falls back to the last commit."""
    if not costs.rate:
        return _Held(costs.load + costs.work + _saves(costs) * costs.save + costs.upload, 0.0)
    # Until the first commit a preemption starts the run anew; after it, only the current segment is repeated.
    whole, rest = _split(costs)
    first = costs.interval if whole else rest
    more = max(whole - 1, 0) * _segment(costs, costs.interval) + (
        _segment(costs, rest) if whole and rest else 0.0
    )
    return _Held(_uninterrupted(costs.load + first + costs.save + costs.upload, costs.rate), more)


def _held_with_notice(costs: _Costs) -> _Held:
    """Return the held hours if every notice is long enough for a save: only starts are repeated."""
    busy = costs.work + _saves(costs) * costs.save + costs.upload
    first = _uninterrupted(costs.load, costs.rate) if costs.rate else costs.load
    return _Held(first, busy * _power(costs.rate * costs.restart))


def _segment(costs: _Costs, work: float) -> float:
    """Return the held hours from one commit to the next."""
    lag = _power(costs.rate * (costs.restart + costs.upload))
    return lag * _growth(costs.rate * (work + costs.save)) / costs.rate


def _uninterrupted(hours: float, rate: float) -> float:
    """Return the held hours until `hours` pass without a preemption, if every preemption starts over."""
    return _growth(rate * hours) / rate


def _power(exponent: float) -> float:
    return math.exp(exponent) if exponent < LARGEST_EXPONENT else math.inf


def _growth(exponent: float) -> float:
    """Return e^x - 1, which is exact near 0 too."""
    return math.expm1(exponent) if exponent < LARGEST_EXPONENT else math.inf


def _split(costs: _Costs) -> tuple[int, float]:
    """Return the number of whole intervals, and the rest of the work in hours."""
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
    """Return the expected hours of one start, which a preemption may cut off."""
    return -math.expm1(-rate * hours) / rate if rate else hours


def _why(costs: _Costs, preemptions: float, lost: float, *, saved_in_time: bool) -> str:
    if not costs.rate:
        return "no preemptions expected"
    loss = "each with enough notice to save" if saved_in_time else f"{lost:.1f} h of work lost"
    return (
        f"{preemptions:.1f} preemptions expected, one per {1 / costs.rate:.1f} h; {loss}; "
        f"a save every {costs.interval * 60:.0f} min"
    )

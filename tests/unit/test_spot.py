"""Expected hours on spot: compared with a simulation, at the limits, and for monotonicity."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.plan import spot
from launcher.plan.spot import (
    SpotOutlook,
    best_interval,
    daly,
    market,
    save_steps,
    spot_expectation,
)

H = 3600.0
USUAL: dict[str, Any] = {
    "work_h": 12.0, "save_s": 5.0, "upload_s": 100.0, "restore_s": 105.0, "load_s": 400.0,
    "provision_h": 0.2, "preemptions_per_h": 0.2,
}  # fmt: skip

runs = st.fixed_dictionaries(
    {
        "work_h": st.floats(0.1, 200),
        "save_s": st.floats(0, 300),
        "upload_s": st.floats(0, 900),
        "restore_s": st.floats(0, 900),
        "load_s": st.floats(0, 1800),
        "provision_h": st.floats(0, 5),
        "preemptions_per_h": st.floats(0, 1.0),
    }
)


def expect(**changes: Any) -> SpotOutlook:
    return spot_expectation(**{**USUAL, **changes})


def lived(choice: random.Random, run: dict[str, Any], interval_s: float) -> tuple[float, int]:
    """Return the held hours and the preemptions of one simulated run, event by event, without the formula."""
    held, losses, committed = 0.0, 0, 0.0
    start = run["load_s"]
    while True:
        life = choice.expovariate(run["preemptions_per_h"] / H)
        now, done = start, committed
        while now < life:
            step = min(interval_s, run["work_h"] * H - done)
            now, done = now + step + run["save_s"], done + step
            if now + run["upload_s"] <= life:
                committed = done
                if done >= run["work_h"] * H - 1e-6:
                    return (held + now + run["upload_s"]) / H, losses
        held, losses = held + life, losses + 1
        start = run["load_s"] + (run["restore_s"] if committed else 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preemptions_per_h": 1.0},
        {"work_h": 2.9, "interval_s": 1800.0},
        {"save_s": 60.0, "upload_s": 0.0},
        {"load_s": 0.0, "restore_s": 0.0, "upload_s": 0.0},
        {"work_h": 0.5, "interval_s": H},
    ],
)
def test_the_formula_is_the_mean_of_simulated_runs(changes: dict[str, Any]) -> None:
    """The closed form equals the mean of simulated runs on machines with exponential lifetimes."""
    run = {**USUAL, **changes}
    expected = spot_expectation(**run)
    choice = random.Random(7)
    played = [lived(choice, run, expected.interval_s) for _ in range(4000)]
    hours = [held for held, _ in played]
    error = statistics.stdev(hours) / math.sqrt(len(hours))
    assert abs(statistics.fmean(hours) - expected.paid_hours) < 4 * error + 0.002 * expected.paid_hours
    assert statistics.fmean(losses for _, losses in played) == pytest.approx(
        expected.preemptions, rel=0.1, abs=0.05
    )


def test_without_preemptions_a_run_takes_its_work_and_its_saves() -> None:
    """At rate 0 nothing is lost, and with free saves and starts the hours are those of the work."""
    bare = expect(preemptions_per_h=0.0, save_s=0.0, upload_s=0.0, load_s=0.0, restore_s=0.0, provision_h=0.0)
    assert bare.hours == bare.paid_hours == 12.0
    assert bare.lost_h == bare.preemptions == 0
    whole = expect(preemptions_per_h=0.0, interval_s=H)
    assert whole.paid_hours == pytest.approx(12 + (400 + 12 * 5 + 100) / H)


def test_a_rate_near_zero_is_the_limit() -> None:
    """At a very small rate the formula gives the result without preemptions."""
    none, hardly = expect(preemptions_per_h=0.0, interval_s=H), expect(preemptions_per_h=1e-9, interval_s=H)
    assert hardly.paid_hours == pytest.approx(none.paid_hours, rel=1e-6)


@given(runs, st.floats(1.0, 3.0))
@settings(max_examples=150, deadline=None)
def test_more_preemptions_are_never_cheaper(run: dict[str, Any], more: float) -> None:
    """A higher rate never saves hours, with a fixed interval and with the best one."""
    worse = {**run, "preemptions_per_h": run["preemptions_per_h"] * more}
    held = {"interval_s": 900.0}
    assert spot_expectation(**worse, **held).paid_hours >= spot_expectation(**run, **held).paid_hours * (
        1 - 1e-7
    )
    assert spot_expectation(**worse, **held).hours >= spot_expectation(**run, **held).hours * (1 - 1e-7)
    assert spot_expectation(**worse).paid_hours >= spot_expectation(**run).paid_hours * 0.98


@given(runs, st.floats(1.0, 3.0))
@settings(max_examples=150, deadline=None)
def test_longer_work_never_takes_fewer_hours(run: dict[str, Any], more: float) -> None:
    """More work never takes less time."""
    longer = spot_expectation(**{**run, "work_h": run["work_h"] * more}, interval_s=900.0)
    assert longer.hours >= spot_expectation(**run, interval_s=900.0).hours * (1 - 1e-7)


@given(runs)
@settings(max_examples=150, deadline=None)
def test_hours_add_up(run: dict[str, Any]) -> None:
    """Work, lost work, saves and starts add up to the paid hours, and with the waits to all hours."""
    found = spot_expectation(**run)
    if math.isinf(found.hours):
        return
    paid = run["work_h"] + found.lost_h + found.saving_h + found.starting_h
    assert paid == pytest.approx(found.paid_hours, rel=1e-5)
    assert found.paid_hours + found.waiting_h == pytest.approx(found.hours)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("save_s", [2.0, 30.0, 240.0])
def test_the_interval_is_within_two_percent_of_the_best(rate: float, save_s: float) -> None:
    """No interval found by brute force costs over 2 % less, among those that leave time for the upload."""
    run = {**USUAL, "work_h": 100.0, "preemptions_per_h": rate, "save_s": save_s}
    chosen = spot_expectation(**run)
    least = spot.UPLOAD_SHARE
    tried = [100 / least * 1.02**power for power in range(200)]
    best = min(
        spot_expectation(**run, interval_s=seconds).paid_hours for seconds in tried if seconds <= 2 * H
    )
    assert chosen.paid_hours <= best * 1.02


def test_young_s_estimate_is_where_losses_are_rare() -> None:
    """If a save is short compared with the time between preemptions, the interval is sqrt(2 x save x mean)."""
    assert daly(save_s=1.0, mean_s=1e6) == pytest.approx(math.sqrt(2e6), rel=0.002)


def test_saves_never_come_faster_than_uploads_go() -> None:
    """With free saves and a slow bucket, uploads take at most half of the time."""
    assert best_interval(save_s=0.0, upload_s=600.0, preemptions_per_h=1.0) == 1200.0


def test_an_interval_is_never_longer_than_the_work() -> None:
    """A short run saves once, at its end."""
    assert best_interval(save_s=5.0, upload_s=1.0, preemptions_per_h=0.0, work_h=0.1) == pytest.approx(360.0)
    assert expect(work_h=0.1).interval_s == pytest.approx(360.0)


def test_a_notice_that_holds_a_save_keeps_the_work() -> None:
    """With a notice long enough for save and upload no work is lost; with one second less it has no effect."""
    kept, late = expect(notice_s=105.0), expect(notice_s=104.0)
    assert kept.lost_h == pytest.approx(0.0, abs=0.05)
    assert late == expect()
    assert kept.paid_hours < late.paid_hours


def test_a_machine_that_never_lasts_a_start_costs_without_end() -> None:
    """If starts take far longer than machines live, the expectation is infinite, not an error."""
    never = expect(preemptions_per_h=2000.0)
    assert math.isinf(never.hours)
    assert math.isinf(never.paid_hours)


def test_an_interval_becomes_save_steps() -> None:
    """The interval becomes the nearest number of steps, at least 1 and at most all."""
    assert save_steps(600.0, step_s=11.0, total_steps=478) == 55
    assert save_steps(5.0, step_s=11.0, total_steps=478) == 1
    assert save_steps(1e9, step_s=11.0, total_steps=478) == 478


def test_without_a_measurement_the_source_has_the_reason() -> None:
    """A GPU without a trace uses the pooled rates, and the source has the reason; more zones shorten the wait."""
    unknown = market("gcp", "A100-80GB", count=8)
    assert "no published data for A100-80GB on gcp" in unknown.source
    assert market("aws", "V100").source.startswith("measured")
    assert market("aws", "V100", count=8).preemptions_per_h == 0.86
    assert market("gcp", "A100", zones=4).provision_h == pytest.approx(market("gcp", "A100").provision_h / 4)

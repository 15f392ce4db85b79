"""Dollars and hours of a run, computed from its events."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.render import duration
from launcher.report import tables
from launcher.runs.account import account
from launcher.runs.listing import listing
from launcher.runs.run import AttemptHistory, Reader, RunHistory
from launcher.runs.summary import summary
from launcher.runs.time_breakdown import NAMES, TimeBreakdown, hours
from launcher.submit.status import usd_so_far
from launcher.watch.state import RunSnapshot
from launcher.watch.view import pairs
from tests.fakes.journeys import BEGIN, LEGS, PLAN, Leg, journey, write_journey
from tests.fakes.runs import attempt_events, write_events
from trainer.accounting import Limit, Limits, RunCost, run_cost
from trainer.bucket import open_run
from trainer.events import Event
from trainer.recipe import load
from trainer.supervisor.budget import BudgetWatch
from trainer.supervisor.model_card import card


def run_of(*attempts: list[Event], finished: str | None = None) -> RunHistory:
    made = tuple(AttemptHistory(number, tuple(events)) for number, events in enumerate(attempts, 1))
    return RunHistory("a-run", "/runs/a-run", made, (), finished)


def claim(at_s: float, *, boot_s: float = 0.0, **price: object) -> Event:
    booted = {"booted": moment(at_s - boot_s)} if boot_s else {}
    return {"kind": "claimed", "method": "dpo", "time": moment(at_s), "attempt": 1, "price": price, **booted}


def moment(at_s: float) -> str:
    return datetime.fromtimestamp(BEGIN.timestamp() + at_s, UTC).isoformat()


def event(kind: str, at_s: float, **fields: object) -> Event:
    return {"kind": kind, "time": moment(at_s), "attempt": 1, **fields}


# Dollars


def test_each_attempt_costs_its_own_price() -> None:
    """An hour of spot at 12 and half an hour on demand at 30 dollars an hour."""
    run = run_of(
        [claim(0, usd_per_h=12.0, market="spot"), event("step", 3600, step=1)],
        [claim(7200, usd_per_h=30.0, market="on demand"), event("done", 9000, step=2)],
    )
    bill = run.cost()
    assert bill == RunCost(seconds=5400, unpriced_s=0, usd=27.0, spot_usd=12.0, on_demand_usd=15.0)


def test_a_running_attempt_costs_until_now() -> None:
    """The running attempt is counted to now, and earlier attempts to their latest event."""
    run = run_of(
        [claim(0, usd_per_h=12.0, market="spot"), event("step", 3600, step=1)],
        [claim(7200, usd_per_h=12.0, market="spot"), event("step", 7300, step=2)],
    )
    assert run.cost(now=BEGIN.timestamp() + 10_800).usd == 24.0


def test_an_unknown_price_is_not_guessed() -> None:
    """Time without a price is reported as such. Without any price, the dollars are None."""
    run = run_of(
        [claim(0, usd_per_h=None), event("step", 1800, step=1)],
        [claim(3600, usd_per_h=10.0), event("done", 7200, step=2)],
    )
    bill = run.cost()
    assert (bill.usd, bill.unpriced_s, bill.on_demand_usd) == (10.0, 1800, 10.0)
    assert run_of([claim(0), event("step", 60, step=1)]).cost().usd is None
    assert run.cost(usd_per_h=4.0).usd == 12.0


def test_the_paid_time_starts_with_the_machine_s_boot() -> None:
    """The boot time before the claim is paid, also for a running attempt."""
    run = run_of(
        [claim(0, boot_s=600, usd_per_h=12.0), event("step", 3600, step=1)],
        [claim(7200, boot_s=300, usd_per_h=12.0), event("step", 7500, step=2)],
    )
    bill = run.cost()
    assert (bill.seconds, bill.usd) == (4800, pytest.approx(16.0))
    assert bill.usd == pytest.approx(run_cost([attempt.events for attempt in run.attempts]).usd)
    assert run.cost(now=BEGIN.timestamp() + 7800).usd == pytest.approx(17.0)


def test_a_run_without_attempts_costs_nothing_known() -> None:
    """Its dollars are None."""
    assert run_of().cost() == RunCost(0, 0, None, 0, 0)


def test_a_machine_that_costs_nothing_is_not_one_of_unknown_price() -> None:
    """A price of zero is known."""
    assert run_of([claim(0, usd_per_h=0.0), event("step", 60, step=1)]).cost().usd == 0.0


def test_every_output_shows_the_same_hours_and_dollars(tmp_path: Path) -> None:
    """A boot 20 minutes before the claim, and a last event whose clock was set back: 1.333 h and $13.33 everywhere."""
    events = [
        claim(0, boot_s=1200, usd_per_h=10.0, market="on demand"),
        event("restored", 10, step=0, files=0, bytes=0, seconds=0.0),
        event("step", 3600, step=1, total_steps=2, loss=0.5),
        event("done", 3540, step=2),
    ]
    write_events(tmp_path / "a-run", events)
    run = Reader(open_run(str(tmp_path), "a-run"), "a-run").read()
    of_account = account(run)
    (listed,) = listing(str(tmp_path), now=BEGIN.timestamp() + 3600)
    watched = RunSnapshot(run, of_account, "done", at_work=False, held_by="", now=BEGIN.timestamp() + 3600)
    watch = BudgetWatch(
        Limits(budget_usd=100), Reporting(), claimed=claim(7200, usd_per_h=10.0), earlier=lambda: [events], clock=lambda: 0.0
    )  # fmt: skip
    dollars = {
        "accounting": run_cost([events]).usd,
        "status": usd_so_far(run, None, now=0.0, at_work=False),
        "runs": listed.usd,
        "summary": summary(run).usd,
        "report": of_account.usd,
        "attempt of the report": of_account.attempts[0].usd,
        "budget": watch.usd,
    }
    assert dollars == pytest.approx(dict.fromkeys(dollars, 13.333), abs=0.005)
    hours_of = {
        "accounting": run_cost([events]).hours,
        "report": of_account.hours.paid_s / 3600,
        "time breakdown": hours(run, run.attempts[0]).paid_s / 3600,
    }
    assert hours_of == pytest.approx(dict.fromkeys(hours_of, 4 / 3))
    assert tables.attempts(of_account).rows[-1][4:6] == (duration(4800), "$13.33")
    assert dict(pairs(watched))["dollars"].startswith("$13.33 so far")
    events[0] |= {"shape": {"accelerator": None, "nodes": 1, "cores": 2}}
    text = card(load("zephyr-tiny/dpo", ()).recipe, events, name="model", step=2, merged=False)
    assert "1.33 hours in 1 attempt" in text
    assert "| 0 to 1 | 1.33 | done |" in text


class Reporting:
    """A reporter that ignores what it receives."""

    def warned(self, message: str) -> None: ...
    def limit(self, limit: Limit, share: float, *, usd: float, hours: float) -> None: ...
    def stopped(self, limit: Limit, where: str, *, usd: float, hours: float) -> None: ...
    def save_s(self) -> float:
        return 0.0


# Hours


def attempt_with(*events: Event) -> list[Event]:
    return [claim(0, usd_per_h=1.0), *events]


def test_every_paid_second_is_in_one_part() -> None:
    """Restore, set-up, steps, evaluation, stall and last upload add up to the paid time."""
    run = run_of(
        attempt_with(
            event("restored", 20, step=10, seconds=15.0),
            event("started", 50, step=10, total_steps=14),
            event("step", 60, step=11, train_s=10.0),
            event("step", 70, step=12, train_s=20.0),
            event("eval", 75, step=12, seconds=5.0, so_far={"count": 1, "seconds": 5.0}),
            event("saved", 78, step=12, stall_s=3.0, so_far={"count": 1, "stall_s": 3.0}),
            event("step", 88, step=13, train_s=30.0),
            event("step", 98, step=14, train_s=40.0),
            event("exported", 110, step=14, seconds=7.0),
            event("done", 112, step=14),
        )
    )
    spent = hours(run, run.attempts[0])
    assert spent == TimeBreakdown(
        useful_s=40, restore_s=15, setup_s=35, evaluation_s=5, stall_s=3, upload_s=14, other_s=0
    )
    assert spent.paid_s == 112
    assert spent.goodput == 40 / 112


def test_steps_that_a_later_attempt_takes_again_are_lost() -> None:
    """Steps after the start of any later attempt are redone."""
    run = run_of(
        attempt_with(
            event("started", 0, step=0, total_steps=30),
            *(event("step", step * 2, step=step, train_s=step * 2.0) for step in range(1, 11)),
        ),
        attempt_with(
            event("restored", 0, step=8, seconds=0.0),
            event("started", 0, step=8, total_steps=30),
            *(event("step", (step - 8) * 2, step=step, train_s=(step - 8) * 2.0) for step in range(9, 13)),
        ),
        attempt_with(
            event("restored", 0, step=6, seconds=0.0),
            event("started", 0, step=6, total_steps=30),
            event("step", 2, step=7, train_s=2.0),
        ),
    )
    first, second, third = (hours(run, attempt) for attempt in run.attempts)
    assert (first.useful_s, first.redone_s) == (12.0, 8.0)
    assert (second.useful_s, second.redone_s) == (0.0, 8.0)
    assert (third.useful_s, third.redone_s) == (2.0, 0.0)


def test_an_attempt_without_steps_makes_no_earlier_step_lost() -> None:
    """It failed before it restored a checkpoint, so the earlier steps still count."""
    run = run_of(
        attempt_with(
            event("started", 0, step=0), *(event("step", s, step=s, train_s=float(s)) for s in (1, 2, 3))
        ),
        attempt_with(event("failed", 9, message="", exit_code=75)),
    )
    assert hours(run, run.attempts[0]).redone_s == 0.0
    assert hours(run, run.attempts[1]).setup_s == 9.0


def test_seconds_of_dropped_steps_are_interpolated() -> None:
    """The log has only steps 1 and 101. A later attempt resumed from step 51."""
    run = run_of(
        attempt_with(event("started", 0, step=0), event("step", 1, step=1, train_s=1.0), event("step", 101, step=101, train_s=101.0)),
        attempt_with(event("restored", 0, step=51, seconds=0.0), event("started", 0, step=51), event("step", 1, step=52, train_s=1.0)),
    )  # fmt: skip
    spent = hours(run, run.attempts[0])
    assert (spent.useful_s, spent.redone_s) == (51.0, 50.0)


def test_parts_never_add_up_to_more_than_was_paid() -> None:
    """The parts are scaled down if two clocks disagree."""
    run = run_of(attempt_with(event("started", 10, step=0), event("step", 20, step=1, train_s=30.0)))
    spent = hours(run, run.attempts[0])
    assert spent.paid_s == pytest.approx(20.0)
    assert spent.setup_s == pytest.approx(5.0)


def test_the_boot_is_paid_but_not_useful() -> None:
    """The boot has its own part, which is not scaled. Set-up starts with the claim."""
    run = run_of([claim(0, boot_s=60, usd_per_h=1.0), event("started", 10, step=0), event("step", 20, step=1, train_s=30.0)])  # fmt: skip
    spent = hours(run, run.attempts[0])
    assert spent.paid_s == pytest.approx(80.0) == pytest.approx(run.attempts[0].cost().seconds)
    assert (spent.boot_s, spent.setup_s) == (60.0, pytest.approx(5.0))
    assert spent.goodput == pytest.approx(15 / 80)
    waits = run_of([claim(0, boot_s=60, usd_per_h=1.0), event("failed", 9, message="", exit_code=75)])
    assert hours(waits, waits.attempts[0]) == TimeBreakdown(boot_s=60, setup_s=9)


def test_logs_of_older_versions_are_read() -> None:
    """Without `train_s`, the times of the step events are used."""
    run = run_of(attempt_events(1, start=0, last=5, total_steps=5))
    spent = hours(run, run.attempts[0])
    assert (spent.useful_s, spent.setup_s) == (5.0, 2.0)


# Accounts


@pytest.fixture
def three_clouds(tmp_path: Path) -> RunHistory:
    write_journey(tmp_path / "a-run", journey())
    return Reader(open_run(str(tmp_path), "a-run"), "a-run").read()


def test_the_account_of_a_run_over_three_clouds(three_clouds: RunHistory) -> None:
    """It has ends, places, markets and steps, and its totals are the sums over the attempts."""
    result = account(three_clouds)
    assert [one.how for one in result.attempts] == ["lost", "preempted", "failed", "done"]
    assert [one.where for one in result.attempts] == [leg.infra for leg in LEGS]
    assert [one.market for one in result.attempts] == ["spot", "spot", "on demand", "spot"]
    assert [(one.start_step, one.last_step) for one in result.attempts] == [
        (0, 143),
        (100, 268),
        (250, 290),
        (250, 478),
    ]
    assert [one.lost_steps for one in result.attempts] == [43, 18, 40, 0]
    assert [round(one.waited_s) for one in result.attempts] == [0, 540, 260, 1500]
    assert result.usd == pytest.approx(sum(one.usd or 0 for one in result.attempts))
    assert result.usd == pytest.approx(result.spot_usd + result.on_demand_usd)
    assert result.hours.paid_s == pytest.approx(sum(one.hours.paid_s for one in result.attempts))
    assert result.wall_s == pytest.approx(result.hours.paid_s + result.provisioning_s)
    assert result.plan == PLAN
    assert (result.state, result.lost_steps, result.commits) == ("done", 101, 10)


def test_boots_shorten_the_time_without_a_machine(three_clouds: RunHistory) -> None:
    """Boot time is paid instead of waited for, and the wall time starts with the first boot."""
    boots = (300.0, 540.0, 100.0, 600.0)
    legs = tuple(leg._replace(boot_s=boot_s) for leg, boot_s in zip(LEGS, boots, strict=True))
    without, result = account(three_clouds), account(run_of(*journey(legs), finished="then"))
    assert [round(one.waited_s) for one in result.attempts] == [0, 0, 160, 900]
    assert result.hours.boot_s == pytest.approx(sum(boots))
    assert result.hours.paid_s == pytest.approx(without.hours.paid_s + sum(boots))
    assert result.wall_s == pytest.approx(result.hours.paid_s + result.provisioning_s)
    assert result.wall_s == pytest.approx(without.wall_s + boots[0])
    assert result.usd == pytest.approx(
        (without.usd or 0) + sum(leg.usd_per_h * leg.boot_s / 3600 for leg in legs if leg.usd_per_h)
    )
    assert result.goodput == pytest.approx(result.hours.useful_s / result.hours.paid_s)
    first = result.as_dict()["attempts"][0]
    assert (first["began"], first["hours"]["boot_s"]) == ("2026-03-14T08:55:00+00:00", 300.0)


def test_memory_is_compared_with_the_fit(three_clouds: RunHistory) -> None:
    """The account has the predicted terms, the measured peak and the capacity."""
    gpu = account(three_clouds).attempts[0].gpu
    assert (gpu.predicted_gib, gpu.measured_gib, gpu.there_gib) == (74.0, 70.4, 79.2)
    assert gpu.terms[0] == ("activations", 31.2)


def test_every_part_has_a_title() -> None:
    """`NAMES` lists every field of `TimeBreakdown`."""
    assert set(NAMES) == set(TimeBreakdown.__dataclass_fields__)


def test_a_claim_of_another_version_is_tolerated(tmp_path: Path) -> None:
    """A shape or fit with unknown fields is left out; the rest of the account is there."""
    events = attempt_events(1, start=0, last=5, total_steps=5)
    events[0] |= {"shape": {"node": "n", "wings": 2}, "fit": {"engine": "steam"}}
    write_events(tmp_path / "a-run", events)
    result = account(Reader(open_run(str(tmp_path), "a-run"), "a-run").read())
    assert (result.attempts[0].shape, result.attempts[0].fit, result.attempts[0].node) == ("", "", "n")


def test_on_demand_dollars_are_not_spot_dollars() -> None:
    """The two markets are counted separately."""
    run = run_of(*journey((Leg("lambda/us-east-1", "on demand", 20.0, 60, None),), total_steps=60))
    result = account(run)
    assert result.spot_usd == 0.0
    assert result.on_demand_usd == result.usd

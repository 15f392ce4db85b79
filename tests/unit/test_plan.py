"""The plan: every offer that could run a recipe, ranked, and the reasons for the rejections."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.plan.rank import Plan, PlanRequest, parse_gpus, plan
from launcher.prices.offer import Offer, Prices, offer_of
from launcher.prices.store import load_snapshot
from trainer.architecture import known_architecture
from trainer.errors import UserError
from trainer.estimate import Workload, known_workload
from trainer.hardware import usable_gib
from trainer.recipe import Recipe, load


def shipped_prices() -> Prices:
    tables = [table for infra in ("gcp", "lambda") if (table := load_snapshot(infra))]
    offers = [offer for table in tables for row in table.rows if (offer := offer_of(row))]
    return Prices(offers=tuple(offers), as_of=date(2026, 11, 21), source="snapshot")


PRICES = shipped_prices()


def recipe(name: str = "zephyr-7b/dpo_full", *overrides: str) -> Recipe:
    return load(name, overrides).recipe


def planned(
    name: str = "zephyr-7b/dpo_full", *overrides: str, prices: Prices = PRICES, **wishes: object
) -> Plan:
    what = recipe(name, *overrides)
    architecture = known_architecture(str(what.model_name_or_path))
    workload = known_workload(what) or Workload(rows=1000, tokens=512, source="a test")
    return plan(what, architecture, prices, workload, PlanRequest.model_validate(wishes))


def test_rows_are_ranked_by_expected_dollars_and_the_first_is_chosen() -> None:
    """By default rows are sorted by expected cost, and the first is chosen."""
    found = planned()
    assert [row.usd for row in found.rows] == sorted(row.usd for row in found.rows)
    assert found.chosen == found.rows[0]
    assert found.rows[0].describe() in found.why


def test_or_by_hours() -> None:
    """With `by="hours"` rows are sorted by expected hours."""
    found = planned(by="hours")
    assert [row.hours for row in found.rows] == sorted(row.hours for row in found.rows)
    assert "shortest expected time" in found.why


def test_every_row_fits_and_keeps_the_global_batch() -> None:
    """Every row fits into the memory of its machine and trains with the recipe's global batch size."""
    for row in planned().rows:
        assert row.fit.gpu.gib <= (usable_gib(row.shape) or 0)
        assert row.fit.host.gib <= row.shape.host_memory_gib
        assert row.fit.processes * row.fit.micro_batch * row.fit.accumulation == 128


def test_each_offer_is_in_its_cheapest_region() -> None:
    """A row has the lowest price of all regions; dearer regions have no row of their own."""
    for row in planned().rows:
        same = [
            offer.spot_usd_per_h if row.spot else offer.usd_per_h
            for offer in PRICES.offers
            if (offer.infra, offer.instance_type) == (row.offer.infra, row.offer.instance_type)
        ]
        assert row.usd_per_h == min(price for price in same if price is not None)


def test_the_seeds_machines_come_out() -> None:
    """Full DPO fits on 8 x 80 GB and on 8 x 40 GB without offloading; LoRA fits on one GPU."""
    large = planned(accelerator="A100-80GB", count=8).rows[0].fit
    small = planned(accelerator="A100", count=8).rows[0].fit
    assert (large.engine, large.offload_optimizer) == ("zero2", False)
    assert (small.engine, small.offload_optimizer) == ("zero2", False)
    asked = planned("notus-7b/dpo_full", "offload=all", accelerator="A100", count=8).rows[0].fit
    assert (asked.offload_optimizer, asked.offload_parameters) == (True, True)
    assert planned("zephyr-7b/dpo_qlora", accelerator="L4", count=1).rows[0].fit.engine == "single"


def test_lambda_rents_no_spot() -> None:
    """Only GCP has spot machines, and `--spot` leaves only those."""
    assert {row.offer.infra for row in planned(spot=True).rows} == {"gcp"}
    assert not any(row.spot for row in planned(spot=False).rows)


@pytest.mark.parametrize("accelerator", [None, "A100"])
def test_a_market_that_a_cloud_does_not_have_is_named(accelerator: str | None) -> None:
    """`--infra lambda --spot` is an error about the market, not about the GPUs."""
    found = shipped_prices()
    here = found.model_copy(update={"offers": tuple(each for each in found.offers if each.infra == "lambda")})
    with pytest.raises(UserError, match=f"lambda rents no {accelerator or 'GPUs'} spot") as error:
        planned(prices=here, spot=True, accelerator=accelerator)
    assert "omit `--spot`" in str(error.value.hint)


def test_spot_counts_preemptions_and_on_demand_does_not() -> None:
    """The expected hours on spot exceed the work, and a spot row has an interval between saves."""
    rows = planned(accelerator="A100-80GB", count=8).rows
    spot = next(row for row in rows if row.spot)
    steady = next(row for row in rows if not row.spot)
    assert spot.expectation
    assert spot.expectation.preemptions > 0
    assert spot.hours > spot.estimate.hours
    assert spot.save_steps
    assert (steady.hours, steady.save_steps, steady.expectation) == (steady.estimate.hours, None, None)


def test_spot_that_saves_nothing_gives_way_to_on_demand() -> None:
    """If spot is nearly as dear as on demand, on demand is chosen, because of the work that spot repeats."""

    def dearer(offer: Offer) -> Offer:
        if not offer.usd_per_h or not offer.spot_usd_per_h:
            return offer
        return offer.model_copy(update={"spot_usd_per_h": 0.99 * offer.usd_per_h})

    prices = PRICES.model_copy(update={"offers": tuple(map(dearer, PRICES.offers))})
    found = planned(prices=prices, accelerator="A100-80GB", count=8)
    assert found.chosen
    assert not found.chosen.spot
    assert any(row.spot for row in found.rows)


def test_what_does_not_fit_is_rejected_with_the_way_out() -> None:
    """A V100 has no bfloat16, and the host memory of a single A100 is too small for the optimizer."""
    rejected = {each.what.split()[0]: each for each in planned().rejected}
    assert "bfloat16" in rejected["V100:8"].why
    assert "130 GiB of each host's memory" in rejected["A100:1"].why
    assert rejected["A100:1"].way_out


def test_arm_hosts_are_left_out_unless_they_are_named() -> None:
    """The image does not run on Grace, so such machines are used only if the user names them."""
    assert any(each.what.startswith("GH200") and "Arm" in each.why for each in planned().rejected)
    assert planned(accelerator="GH200").rows


def test_budget_and_deadline_reject_with_their_values() -> None:
    """No chosen row exceeds a limit, and every rejection has the value and the limit."""
    found = planned(budget_usd=20, deadline_h=2)
    assert all(row.usd <= 20 and row.hours <= 2 for row in found.rows)
    reasons = [each.why for each in found.rejected]
    assert any("over the budget of $20" in why for why in reasons)
    assert any("past the deadline of 2 h" in why for why in reasons)


def test_nothing_left_is_no_choice() -> None:
    """An impossible budget leaves no row, but the rejections have their reasons."""
    found = planned(budget_usd=0.01)
    assert (found.chosen, found.rows) == (None, ())
    assert found.rejected


def test_two_nodes_cost_twice_an_hour() -> None:
    """The price of two nodes is twice that of one."""
    one = planned(accelerator="A100-80GB", count=8, spot=False).rows[0]
    two = planned(accelerator="A100-80GB", count=8, spot=False, nodes=2).rows[0]
    assert two.usd_per_h == 2 * one.usd_per_h
    assert two.fit.processes == 16
    assert str(two.shape) == "2 x A100-80GB:8"


def test_unavailable_gpus_are_refused_with_the_available_ones() -> None:
    """An unavailable GPU, or number of GPUs, is an error with the available ones."""
    with pytest.raises(UserError, match="no cloud of this plan rents a machine with 7 x A100") as error:
        planned(accelerator="A100", count=7)
    assert "1, 2, 4, 8" in str(error.value.hint)
    with pytest.raises(UserError, match="no cloud of this plan rents RTX4090"):
        planned(accelerator="RTX4090")


def test_a_place_where_nothing_is_rented_says_why() -> None:
    """The user's own cluster has no prices, so there is no plan, and the error has the reason."""
    own = Prices(offers=(), as_of=date(2026, 11, 21), source="snapshot", notes=("slurm has no prices",))
    with pytest.raises(
        UserError, match="no machines are for rent on the requested infrastructure; slurm has no prices"
    ):
        planned(prices=own)


@pytest.mark.parametrize(
    ("text", "parsed"), [("A100:8", ("A100", 8)), ("a100-80gb:4", ("A100-80GB", 4)), ("L4", ("L4", None))]
)
def test_gpus_are_read(text: str, parsed: tuple[str, int | None]) -> None:
    """Names and counts are read as SkyPilot writes them, in any case."""
    assert parse_gpus(text) == parsed


@pytest.mark.parametrize("text", ["A100:", "A100:0", "A100:x", "A10000:8"])
def test_gpus_that_cannot_be_are_refused(text: str) -> None:
    """An invalid count or an unknown GPU is a UserError."""
    with pytest.raises(UserError):
        parse_gpus(text)


@settings(deadline=None)  # a loaded machine is no failure
@given(factor=st.floats(min_value=1.0, max_value=10.0), which=st.integers(min_value=0, max_value=5))
def test_a_dearer_offer_is_never_ranked_better(factor: float, which: int) -> None:
    """Raising the price of one machine never moves it up."""
    before = [row.offer.instance_type for row in planned(accelerator="H100", spot=False).rows]
    named = before[which % len(before)]

    def raised(offer: Offer) -> Offer:
        if offer.instance_type != named:
            return offer
        return offer.model_copy(update={"usd_per_h": (offer.usd_per_h or 0) * factor})

    dearer = PRICES.model_copy(update={"offers": tuple(map(raised, PRICES.offers))})
    after = [row.offer.instance_type for row in planned(accelerator="H100", spot=False, prices=dearer).rows]
    assert after.index(named) >= before.index(named)

"""A node finds its own price and the plan in the environment that the launcher wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.cloud.skypilot import UNPRICED
from tests.servers.metadata import MetadataServer
from tests.unit.test_orders import _no_settings, order  # noqa: F401 (a fixture, used by being there)
from trainer.hardware import Shape
from trainer.options import PLAN, PRICES, USD_PER_H
from trainer.supervisor.preemption import HOST_VARIABLE
from trainer.supervisor.price import CLUSTER, OWN, Price, detect_price, is_rented, read_plan

A100 = Shape(accelerator="A100", count=8, memory_gib=39.6, cores=96, host_memory_gib=680, node="n")
CPU = Shape(accelerator=None, count=0, memory_gib=None, cores=2, host_memory_gib=4, node="n")


def listed(infra: str, market: str, usd_per_h: float, **given: Any) -> dict[str, Any]:
    return {"infra": infra, "gpus": "A100:8", "market": market, "usd_per_h": usd_per_h, **given}


LISTING = [
    listed("gcp/us-central1", "spot", 9.0, instance_type="a2-highgpu-8g"),
    listed("gcp/us-central1", "on demand", 29.0, instance_type="a2-highgpu-8g"),
    listed("gcp/europe-west4", "spot", 11.0, instance_type="a2-highgpu-8g"),
    listed("lambda/us-east-1", "on demand", 15.0),
]


def environ(cloud: str, region: str | None, prices: object = LISTING) -> dict[str, str]:
    cluster = {"cluster_name": "c", "cloud": cloud, "region": region, "zone": None}
    return {CLUSTER: json.dumps(cluster), PRICES: json.dumps(prices)}


def looks(answers: dict[str, str]) -> Any:
    return answers.get


@pytest.mark.parametrize(
    ("preemptible", "region", "found"),
    [
        ("TRUE", "us-central1", Price(usd_per_h=9.0, market="spot", cloud="gcp", region="us-central1")),
        (
            "FALSE",
            "us-central1",
            Price(usd_per_h=29.0, market="on demand", cloud="gcp", region="us-central1"),
        ),
        ("TRUE", "europe-west4", Price(usd_per_h=11.0, market="spot", cloud="gcp", region="europe-west4")),
        ("TRUE", "asia-east1", Price(market="spot", cloud="gcp", region="asia-east1")),
    ],
)
def test_a_gce_machine_has_the_price_of_its_region_and_market(
    preemptible: str, region: str, found: Price
) -> None:
    """SkyPilot names the region and Google's metadata server the market. The price of another region is not used."""
    answers = {"instance/scheduling/preemptible": preemptible}
    assert detect_price(A100, environ=environ("GCP", region), query=looks(answers)) == found


def test_a_cloud_with_one_market_needs_no_metadata_server() -> None:
    """Lambda has no spot machines, and no metadata server is asked there."""
    found = detect_price(
        A100, environ=environ("Lambda", "us-east-1"), query=lambda _key: pytest.fail("asked")
    )
    assert found == Price(usd_per_h=15.0, market="on demand", cloud="lambda", region="us-east-1")


def test_an_unknown_market_gets_the_highest_price() -> None:
    """A budget then stops the run too early rather than too late. The market remains unknown."""
    found = detect_price(A100, environ=environ("GCP", "us-central1"), query=looks({}))
    assert found == Price(usd_per_h=29.0, market=None, cloud="gcp", region="us-central1")


def test_the_instance_type_distinguishes_hosts_of_one_gpu() -> None:
    """An L4 is rented with several hosts that have different prices."""
    both = [
        listed("gcp/us-central1", "spot", 1.0, instance_type="small"),
        listed("gcp/us-central1", "spot", 2.0, instance_type="large"),
    ]
    answers = {
        "instance/scheduling/preemptible": "TRUE",
        "instance/machine-type": "projects/1/machineTypes/small",
    }
    there = environ("GCP", "us-central1", both)
    assert detect_price(A100, environ=there, query=looks(answers)).usd_per_h == 1.0
    del answers["instance/machine-type"]
    assert detect_price(A100, environ=there, query=looks(answers)).usd_per_h == 2.0


@pytest.mark.parametrize(
    ("given", "usd_per_h"),
    [
        ({}, None),
        ({USD_PER_H: "2.5"}, 2.5),
        ({USD_PER_H: "0"}, 0.0),
        ({USD_PER_H: "two"}, None),
        ({USD_PER_H: "-1"}, None),
        ({USD_PER_H: "nan"}, None),
        ({PRICES: "[{"}, None),
        ({PRICES: '[{"infra": 1}]', CLUSTER: "nonsense"}, None),
        ({CLUSTER: "[]"}, None),
    ],
)
def test_a_machine_of_ones_own_has_the_price_that_its_owner_sets(
    given: dict[str, str], usd_per_h: float | None
) -> None:
    """A missing or invalid value means that the price is unknown. The run does not fail."""
    assert detect_price(CPU, environ=given) == Price(usd_per_h=usd_per_h)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (environ("GCP", "us-central1"), True),
        (environ("Lambda", "us-east-1"), True),
        (environ("Slurm", "cluster"), False),
        (environ("Kubernetes", "context"), False),
        (environ("SSH", "pool"), False),
        (environ("RunPod", "CA"), False),
        ({**environ("GCP", "us-central1"), USD_PER_H: "3"}, False),
        ({}, False),
        ({CLUSTER: "nonsense"}, False),
    ],
)
def test_only_whole_machines_of_a_cloud_count_as_rented(here: dict[str, str], expected: bool) -> None:
    """Own machines do not count, and neither do containers, whose hosts booted for other customers too."""
    assert is_rented(here) is expected


def test_launcher_and_node_agree_on_the_places_without_prices() -> None:
    """The launcher looks up no prices for places where users have machines of their own."""
    assert set(UNPRICED) == OWN


def test_the_metadata_server_is_asked() -> None:
    """The request goes over a socket, as on a machine of GCE."""
    with MetadataServer(spot=True) as server:
        here = {**environ("GCP", "us-central1"), HOST_VARIABLE: server.host}
        assert detect_price(A100, environ=here).market == "spot"
        server.values["instance/scheduling/preemptible"] = "FALSE"
        assert detect_price(A100, environ=here).usd_per_h == 29.0


def test_gpus_that_are_not_in_the_plan_have_no_price() -> None:
    """The price of another machine would be wrong."""
    other = A100.model_copy(update={"count": 4})
    assert detect_price(other, environ=environ("Lambda", "us-east-1")).usd_per_h is None


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_plan_that_cannot_be_read_is_none(text: str) -> None:
    """A run that was started by plain `sky launch` has no plan, which is not an error."""
    assert read_plan({PLAN: text}) is None
    assert read_plan({}) is None


def test_a_node_finds_the_price_and_plan_that_the_launcher_sends() -> None:
    """Launcher and trainer agree on names and formats. The chosen machine finds the price of the plan."""
    made = order(gpus="A100-80GB:8")
    row = made.row
    assert row
    envs = made.launch.task["envs"]
    shape = row.shape.model_copy(update={"node": "another-name"})
    there = {**envs, **environ("GCP", row.offer.region), PRICES: envs[PRICES]}
    answers = {"instance/scheduling/preemptible": "TRUE" if row.spot else "FALSE"}
    found = detect_price(shape, environ=there, query=looks(answers))
    assert found.usd_per_h == pytest.approx(row.usd_per_h)
    assert found.market == ("spot" if row.spot else "on demand")
    plan = read_plan(envs)
    assert plan
    assert (plan["usd"], plan["hours"]) == (
        pytest.approx(row.usd, abs=1e-3),
        pytest.approx(row.hours, abs=1e-3),
    )
    assert {"usd_per_h", "market", "gpu_gib", "host_gib", "step_s"} <= plan.keys()


def test_every_place_that_skypilot_may_choose_has_its_price() -> None:
    """A candidate names a cloud, and SkyPilot may choose any of its regions."""
    made = order(gpus="A100-80GB:8")
    prices = json.loads(made.launch.task["envs"][PRICES])
    clouds = {each["infra"] for each in made.launch.task["resources"]["ordered"]}
    assert {each["infra"].partition("/")[0] for each in prices} == clouds
    assert len({each["infra"] for each in prices if each["infra"].startswith("gcp/")}) > 1
    assert all(each["gpus"] == "A100-80GB:8" and each["usd_per_h"] > 0 for each in prices)


def test_prices_are_of_all_nodes() -> None:
    """The price is what an hour of the run costs."""
    one, two = (json.loads(order(gpus="A100-80GB:8", nodes=n).launch.task["envs"][PRICES]) for n in (1, 2))
    by_place = {(each["infra"], each["market"]): each["usd_per_h"] for each in one}
    for each in two:
        assert each["usd_per_h"] == pytest.approx(2 * by_place[each["infra"], each["market"]], abs=1e-3)


def test_own_machines_get_the_price_of_the_settings() -> None:
    """Rented machines do not get it."""
    own = order("zephyr-tiny/dpo", gpus="A100:8", infra=("slurm",), environ={USD_PER_H: "3"})
    assert own.launch.task["envs"][USD_PER_H] == "3"
    assert not {PRICES, PLAN} & own.launch.task["envs"].keys()
    assert USD_PER_H not in order(gpus="A100-80GB:8", environ={USD_PER_H: "3"}).launch.task["envs"]

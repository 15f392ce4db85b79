"""Loading offers: from a fresh cache, else from SkyPilot's catalog, else from the newest known prices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from launcher.cloud.protocol import CatalogRow
from launcher.cloud.skypilot import Fetched
from launcher.prices import store
from launcher.prices.load import FakeCatalogs, Offer, Prices, load_prices
from launcher.prices.store import Table
from trainer.errors import Unavailable, UserError
from trainer.hardware import Shape

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SNAPSHOT_DAY = date(2026, 11, 21)
ROOT = Path(__file__).resolve().parents[2]
A100 = CatalogRow("gcp", "us-central1", "a2-highgpu-8g", "A100", 8, 96, 680.0, 30.0, 15.0)
H100 = CatalogRow("lambda", "us-east-1", "gpu_8x_h100_sxm5", "H100", 8, 208, 1800.0, 31.92, None)
L40S = CatalogRow("aws", "us-east-2", "g6e.2xlarge", "L40S", 1, 8, 64.0, 2.24, 1.1)
ALL = {row.infra: Fetched((row,)) for row in (A100, H100, L40S)}
OFFER = Offer(
    infra="gcp",
    region="us-central1",
    zone=None,
    instance_type="a2-highgpu-8g",
    shape=Shape(
        accelerator="A100", count=8, memory_gib=40.0, cores=96, host_memory_gib=680.0, node="a2-highgpu-8g"
    ),
    usd_per_h=30.0,
    spot_usd_per_h=15.0,
)

Load = Callable[..., Prices]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(catalogs: FakeCatalogs, **given: object) -> Prices:
        return load_prices(**{"now": NOW, "folder": tmp_path, "catalogs": catalogs, **given})  # type: ignore[arg-type]

    return load


def test_skypilots_catalog_becomes_offers(load: Load) -> None:
    """A catalog row becomes an offer with the shape that a fit needs."""
    prices = load(FakeCatalogs(ALL), infra=["gcp"])
    assert prices == Prices(offers=(OFFER,), as_of=NOW.date(), source="skypilot")


def test_gcp_and_lambda_are_asked_for_unless_others_are_named(load: Load) -> None:
    """By default one request asks for the prices of GCP and Lambda."""
    catalogs = FakeCatalogs(ALL)
    assert [offer.infra for offer in load(catalogs).offers] == ["gcp", "lambda"]
    assert catalogs.asked == [("gcp", "lambda")]


def test_skypilot_is_asked_once_a_day(load: Load) -> None:
    """A fresh cache is used without a request; after 24 hours SkyPilot is asked again."""
    catalogs = FakeCatalogs(ALL)
    load(catalogs)
    again = load(catalogs, now=NOW + timedelta(hours=23))
    assert (again.source, again.as_of, again.notes) == ("cache", NOW.date(), ())
    assert len(catalogs.asked) == 1
    assert load(catalogs, now=NOW + timedelta(hours=24)).source == "skypilot"
    assert len(catalogs.asked) == 2


def test_only_what_is_not_cached_is_asked_for(load: Load) -> None:
    """Every cloud's prices have their own age, and the date of the oldest is reported."""
    catalogs = FakeCatalogs(ALL)
    load(catalogs, infra=["gcp"])
    prices = load(catalogs, infra=["gcp", "aws"], now=NOW + timedelta(hours=20))
    assert catalogs.asked == [("gcp",), ("aws",)]
    assert (prices.source, prices.as_of) == ("cache", NOW.date())


def test_a_refresh_asks_again(load: Load) -> None:
    """With `refresh`, SkyPilot is asked although the cache is fresh."""
    catalogs = FakeCatalogs(ALL)
    load(catalogs)
    assert load(catalogs, refresh=True).source == "skypilot"
    assert len(catalogs.asked) == 2


def test_without_skypilot_the_snapshot_is_used_with_a_note(load: Load) -> None:
    """Without SkyPilot or a network, the snapshot is used, and the notes have its date and the reason."""
    prices = load(FakeCatalogs())
    assert (prices.source, prices.as_of) == ("snapshot", SNAPSHOT_DAY)
    assert prices.notes == (
        "gcp: prices of 2026-11-21, from the shipped snapshot: the network is down",
        "lambda: prices of 2026-11-21, from the shipped snapshot: the network is down",
    )
    assert len(prices.offers) > 200


def test_the_snapshot_is_never_taken_for_fresh(load: Load, tmp_path: Path) -> None:
    """The snapshot is not written to the cache, so SkyPilot is asked again soon."""
    catalogs = FakeCatalogs()
    load(catalogs)
    assert not list(tmp_path.glob("*.json"))
    catalogs.answers = dict(ALL)
    assert load(catalogs, now=NOW + store.RETRY_INTERVAL).source == "skypilot"


def test_a_failure_is_not_tried_again_at_once(load: Load) -> None:
    """After a failure, the next plan does not wait again for SkyPilot's import and the network; the note stays."""
    catalogs = FakeCatalogs()
    first = load(catalogs)
    soon = NOW + store.RETRY_INTERVAL - timedelta(seconds=1)
    assert load(catalogs, now=soon) == first
    assert len(catalogs.asked) == 1
    load(catalogs, now=soon, refresh=True)
    assert len(catalogs.asked) == 2


def test_a_missing_skypilot_is_not_remembered(load: Load) -> None:
    """Once SkyPilot is installed, its prices are used at once."""
    missing = UserError("SkyPilot is not installed")
    load(FakeCatalogs({"gcp": missing}), infra=["gcp"])
    assert load(FakeCatalogs(ALL), infra=["gcp"]).source == "skypilot"


@pytest.mark.parametrize("text", ["", "yesterday\ndown", "2026-11-22T12:00:00\ndown", "\xff"])
def test_a_damaged_record_of_a_failure_is_none(load: Load, tmp_path: Path, text: str) -> None:
    """A damaged failure file is ignored."""
    (tmp_path / "gcp.failed").write_text(text, encoding="latin-1")
    assert load(FakeCatalogs(ALL), infra=["gcp"]).source == "skypilot"


def test_an_old_cache_is_better_than_an_older_snapshot(load: Load) -> None:
    """If SkyPilot cannot be asked, the newest prices are used: here those of the cache."""
    load(FakeCatalogs(ALL))
    prices = load(FakeCatalogs(), infra=["lambda"], now=NOW + timedelta(days=3))
    assert (prices.source, prices.as_of) == ("cache", NOW.date())
    assert prices.notes == ("lambda: prices of 2026-11-22, from the cache: the network is down",)


def test_a_new_snapshot_is_better_than_an_older_cache(load: Load, tmp_path: Path) -> None:
    """A cache older than the snapshot is ignored."""
    store.write_cache("gcp", Table(NOW - timedelta(days=99), "long ago", (A100,)), folder=tmp_path)
    assert load(FakeCatalogs(), infra=["gcp"]).source == "snapshot"


def test_a_damaged_cache_is_asked_for_again(load: Load, tmp_path: Path) -> None:
    """A damaged cache leads to a request, which repairs it."""
    (tmp_path / "gcp.json").write_text("{")
    catalogs = FakeCatalogs(ALL)
    assert load(catalogs, infra=["gcp"]).source == "skypilot"
    assert load(catalogs, infra=["gcp"]).source == "cache"


def test_the_least_fresh_source_is_reported(load: Load) -> None:
    """If one cloud falls back to the snapshot, the source of all is `snapshot`, although the other has fresh prices."""
    prices = load(FakeCatalogs({"gcp": Fetched((A100,))}))
    assert (prices.source, prices.as_of) == ("snapshot", SNAPSHOT_DAY)
    assert OFFER in prices.offers
    assert len(prices.notes) == 1


def test_an_empty_catalog_is_no_answer(load: Load, tmp_path: Path) -> None:
    """A catalog without any GPU is an error of the catalog, and does not overwrite the cache."""
    prices = load(FakeCatalogs({"gcp": Fetched(())}), infra=["gcp"])
    assert prices.source == "snapshot"
    assert "SkyPilot lists no GPUs of gcp" in prices.notes[0]
    assert not list(tmp_path.glob("*.json"))


def test_what_skypilot_warns_of_is_passed_on(load: Load) -> None:
    """SkyPilot may warn that it used an old catalog of its own; such prices are not cached."""
    warning = "Failed to fetch gcp catalog gcp/vms.csv. Using cached catalog files."
    prices = load(FakeCatalogs({"gcp": Fetched((A100,), (warning,))}), infra=["gcp"])
    assert prices.notes == (f"SkyPilot: {warning}",)
    assert (
        load(FakeCatalogs(ALL), infra=["gcp"]).source == "skypilot"
    )  # what is of no certain age is not kept


def test_another_cloud_is_skypilots_alone_to_price(load: Load) -> None:
    """`--infra aws` works if SkyPilot has prices; otherwise SkyPilot's error is raised."""
    assert load(FakeCatalogs(ALL), infra=["aws"]).offers[0].shape.accelerator == "L40S"
    with pytest.raises(Unavailable, match="the network is down"):
        load(FakeCatalogs(), infra=["runpod"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpc", "did you mean `gcp`"),
        ("lamda", "`lambda`"),
        ("x", "known: aws"),
        ("gcp,lambda", "`--infra gcp --infra lambda`"),
    ],
)
def test_an_unknown_infrastructure_is_an_error(load: Load, name: str, hint: str) -> None:
    """An unknown infrastructure is an error with the nearest names, without any request."""
    catalogs = FakeCatalogs(ALL)
    with pytest.raises(UserError, match=f"unknown infrastructure `{name}`") as caught:
        load(catalogs, infra=[name])
    assert hint in (caught.value.hint or "")
    assert not catalogs.asked


def test_what_one_owns_has_no_price(load: Load) -> None:
    """The user's own cluster or machine has no offers, and a note has the reason."""
    catalogs = FakeCatalogs(ALL)
    prices = load(catalogs, infra=["k8s", "slurm", "local"])
    assert (prices.offers, catalogs.asked) == ((), [])
    assert prices.notes[0] == "kubernetes has no prices: its machines are not rented"
    assert load(catalogs, infra=["slurm", "GCP"]).offers == (OFFER,)


def test_a_region_narrows_a_cloud(load: Load) -> None:
    """`gcp/us-central1` limits offers to the region; a region without GPUs is an error that names the others."""
    prices = load(FakeCatalogs(), infra=["gcp/us-central1"])
    assert {offer.region for offer in prices.offers} == {"us-central1"}
    with pytest.raises(UserError, match="no GPUs in region `us-centrall`") as caught:
        load(FakeCatalogs(), infra=["gcp/us-centrall"])
    assert "`us-central1`" in (caught.value.hint or "")


def test_a_cloud_that_is_named_twice_is_offered_once(load: Load) -> None:
    """A cloud that is named whole and by region has every offer once."""
    catalogs = FakeCatalogs(ALL)
    assert load(catalogs, infra=["gcp", "gcp", "gcp/us-central1"]).offers == (OFFER,)
    assert catalogs.asked == [("gcp",)]


def test_prices_survive_json() -> None:
    """Prices can be read back from the JSON that `--json` prints."""
    prices = Prices(offers=(OFFER,), as_of=NOW.date(), source="cache", notes=("old",))
    assert Prices.model_validate_json(prices.model_dump_json()) == prices


def test_prices_that_are_at_hand_are_read_without_skypilot() -> None:
    """`import sky` takes seconds; a plan with cached prices does not import it."""
    script = (
        "import sys, tempfile\n"
        "from datetime import UTC, datetime\n"
        "from pathlib import Path\n"
        "from launcher.prices.load import load_prices\n"
        "from launcher.prices.load import FakeCatalogs\n"
        "prices = load_prices(now=datetime.now(UTC), folder=Path(tempfile.mkdtemp()), catalogs=FakeCatalogs())\n"
        "assert prices.source == 'snapshot' and prices.offers\n"
        "assert not {'sky', 'pandas', 'numpy', 'requests'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0

"""SkyPilot's catalogs as rows: tested against a stand-in, and against SkyPilot itself if it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cloud import skypilot
from launcher.cloud.protocol import CatalogRow
from trainer.errors import Unavailable

ROOT = Path(__file__).resolve().parents[2]
NAN = float("nan")
HOST = "{0},{1},{2},,,,{3},{3}-a,{4},{5}\n"
GPUS = ",,,{0},{1},\"{{'Gpus': [{{'MemoryInfo': {{'SizeInMiB': 40960}}}}]}}\",{2},{2}-a,{3},{4}\n"
GCP = (
    "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice\n"
    + HOST.format("a2-highgpu-8g", 96, 680, "us-central1", 5.9, 2.9)
    + HOST.format("a2-highgpu-8g", 96, 680, "me-west1", 6.5, "")
    + HOST.format("g2-standard-4", 4, 16, "us-central1", 0.2, 0.1)
    + HOST.format("g2-standard-12", 12, 48, "us-central1", 0.5, 0.25)
    + HOST.format("g2-standard-12", 12, 48, "me-west1", 0.6, 0.3)
    + HOST.format("n2-standard-8", 8, 32, "us-central1", 0.4, 0.1)
    + GPUS.format("A100", 8, "us-central1", 23.5, 11.5)
    + GPUS.format("A100", 8, "me-west1", 25.8, "")
    + GPUS.format("L4", 1, "us-central1", 0.5, 0.2)
    + ",,,tpu-v5e-8,1,,us-central1,us-central1-a,9.6,4.8\n"
)
LAMBDA = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice\n"
    "cpu_4x_general,,,4.0,16.0,0.2,us-east-1,,\n"
    "gpu_8x_a100,A100,8.0,124.0,1800.0,15.92,us-east-1,"
    "\"{'Gpus': [{'Name': 'A100', 'MemoryInfo': {'SizeInMiB': 40960}}]}\",\n"
)
SCRIPT = """
import json
from launcher.cloud import skypilot
from trainer.errors import UserError
answers = skypilot.catalogs(["gcp", "lambda", "cudo"])
print(json.dumps({infra: str(a) if isinstance(a, UserError) else a.rows for infra, a in answers.items()}))
from sky.skylet.constants import ALL_CLOUDS
print(json.dumps(sorted(ALL_CLOUDS)))
"""


def entry(**given: Any) -> SimpleNamespace:
    """Return an entry like SkyPilot's `InstanceTypeInfo`."""
    some = {
        "instance_type": "g5.xlarge",
        "accelerator_name": "A10G",
        "accelerator_count": 1.0,
        "cpu_count": 4.0,
        "memory": 16.0,
        "price": 1.006,
        "spot_price": 0.4,
        "region": "us-east-1",
    }
    return SimpleNamespace(**{**some, **given})


def rows(*entries: SimpleNamespace) -> tuple[CatalogRow, ...]:
    def list_accelerators(**wanted: object) -> dict[str, Sequence[SimpleNamespace]]:
        assert wanted == {"gpus_only": True, "clouds": "aws", "all_regions": True}
        return {"A10G": entries}

    return skypilot._rows("aws", SimpleNamespace(list_accelerators=list_accelerators))


def test_an_entry_becomes_a_row() -> None:
    """The row's numbers are Python's, not pandas'."""
    assert rows(entry()) == (CatalogRow("aws", "us-east-1", "g5.xlarge", "A10G", 1, 4, 16.0, 1.006, 0.4),)


@pytest.mark.parametrize(("name", "missing"), [("spot_price", 8), ("price", 7)])
def test_a_missing_price_is_none(name: str, missing: int) -> None:
    """A missing price, NaN in the catalog, becomes None, because NaN passes silently through sums and comparisons."""
    (row,) = rows(entry(**{name: NAN}))
    assert row[missing] is None


@pytest.mark.parametrize(
    "given",
    [
        {"instance_type": None},
        {"cpu_count": NAN},
        {"memory": None},
        {"accelerator_count": 0.5},
        {"price": NAN, "spot_price": NAN},
    ],
)
def test_what_is_no_whole_machine_with_a_price_is_left_out(given: dict[str, object]) -> None:
    """Entries without cores, memory or any price, and shares of a GPU, are left out: they cannot be planned for."""
    assert rows(entry(**given), entry()) == rows(entry())


def test_a_download_that_hangs_is_left_behind() -> None:
    """SkyPilot's downloads have no timeout, so ours abandons them; the clouds that answered before are used."""
    done, ended = (
        skypilot.Fetched((CatalogRow("gcp", "r", "t", "L4", 1, 4, 16.0, 1.0, None),)),
        threading.Event(),
    )

    def fetch(infra: str) -> skypilot.Fetched:
        if infra == "lambda":
            ended.wait(30)
        return done

    answers = skypilot.catalogs(["gcp", "lambda"], timeout_s=0.2, fetch=fetch)
    ended.set()
    assert answers["gcp"] == done
    assert "SkyPilot had no prices within 0.2 s" in str(answers["lambda"])


def test_a_user_error_is_an_answer_and_a_bug_is_raised() -> None:
    """A UserError of one cloud is an answer for that cloud; a bug is raised with its traceback, also from a thread."""
    down = Unavailable("down")

    def fetch(infra: str) -> skypilot.Fetched:
        raise {"gcp": down, "aws": ZeroDivisionError}[infra]

    assert skypilot.catalogs(["gcp"], fetch=fetch) == {"gcp": down}
    with pytest.raises(ZeroDivisionError):
        skypilot.catalogs(["gcp", "aws"], fetch=fetch)


def test_without_skypilot_the_error_has_the_install_command() -> None:
    """Without SkyPilot, the error has the command that installs it."""
    script = (
        "import sys; sys.modules['sky'] = None\n"
        "from launcher.cloud import skypilot\n"
        "print(skypilot.catalogs(['gcp'])['gcp'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "SkyPilot is not installed" in done.stdout
    assert skypilot.INSTALL in done.stdout


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return what SkyPilot itself makes of small catalogs; it has none for a third cloud, and no network to download it."""
    if not importlib.util.find_spec("sky"):
        pytest.skip("SkyPilot is not installed: make setup")
    folder = tmp_path_factory.mktemp("sky")
    for cloud, text in (("gcp", GCP), ("lambda", LAMBDA)):
        path = folder / ".sky" / "catalogs" / "v8" / cloud / "vms.csv"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    nowhere = {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, **nowhere, "SKY_RUNTIME_DIR": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_skypilot_itself_gives_these_rows(live: list[Any]) -> None:
    """The prices of GCP's hosts and accelerators are added up, and nothing else is printed."""
    answers, _ = live
    assert sorted(map(tuple, answers["gcp"])) == [
        ("gcp", "me-west1", "a2-highgpu-8g", "A100", 8, 96, 680.0, pytest.approx(32.3), None),
        (
            "gcp",
            "us-central1",
            "a2-highgpu-8g",
            "A100",
            8,
            96,
            680.0,
            pytest.approx(29.4),
            pytest.approx(14.4),
        ),
        ("gcp", "us-central1", "g2-standard-12", "L4", 1, 12, 48.0, pytest.approx(1.0), pytest.approx(0.45)),
        ("gcp", "us-central1", "g2-standard-4", "L4", 1, 4, 16.0, pytest.approx(0.7), pytest.approx(0.3)),
    ]
    assert answers["lambda"] == [["lambda", "us-east-1", "gpu_8x_a100", "A100", 8, 124, 1800.0, 15.92, None]]


def test_a_catalog_that_cannot_be_downloaded_is_an_error(live: list[Any]) -> None:
    """A failed download is one error message of ours, with SkyPilot's reason."""
    answers, _ = live
    assert answers["cudo"].startswith("SkyPilot has no prices for cudo: Failed to fetch Cudo catalog")


def test_all_of_skypilots_clouds_are_known_by_name(live: list[Any]) -> None:
    """Our list of clouds is complete, so that a name can be checked without importing SkyPilot."""
    _, clouds = live
    assert sorted([*skypilot.PRICED, *skypilot.UNPRICED]) == clouds


def test_a_home_that_cannot_be_written_to_leaves_the_shipped_prices() -> None:
    """SkyPilot's import creates folders in the home; if it fails, the answer is `Unavailable`, and a plan uses the snapshot."""
    pytest.importorskip("sky")
    ask = "from launcher.cloud.skypilot import catalogs; print(repr(catalogs(['gcp'])['gcp']))"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=ROOT,
        env={**os.environ, "HOME": "/dev/null/home"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Unavailable" in done.stdout, done.stderr
    assert "SkyPilot cannot start" in done.stdout

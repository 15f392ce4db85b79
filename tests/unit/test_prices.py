"""Prices stored on this machine: the file format, the cache and the shipped snapshot."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.cloud.protocol import CatalogRow
from launcher.prices import store
from launcher.prices.offer import offer_of
from launcher.prices.store import Table, dump, parse, read
from trainer.hardware import known_gpu

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
L4 = CatalogRow("gcp", "us-central1", "g2-standard-12", "L4", 1, 12, 48.0, 1.0005, 0.4001)
A100 = CatalogRow("lambda", "us-east-1", "gpu_8x_a100", "A100", 8, 124, 1800.0, 15.92, None)
TABLE = Table(NOW, "a test", (L4, A100))


def test_a_table_survives_its_file() -> None:
    """Prices, also missing ones, are read back as they were written."""
    assert parse(dump(TABLE)) == TABLE


def test_equal_tables_are_equal_files_with_a_row_a_line() -> None:
    """The file is sorted, one line per row, so that the diff of a new snapshot shows only what has changed."""
    assert dump(TABLE) == dump(TABLE._replace(rows=(A100, L4)))
    assert sum(line.startswith('["') for line in dump(TABLE).splitlines()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        dump(TABLE)[:-40],
        dump(TABLE).replace('"format": 1', '"format": 0'),
        dump(TABLE).replace('"usd_per_h"', '"eur_per_h"'),
        dump(TABLE).replace("15.92", '"dear"'),
        dump(TABLE).replace(', "A100", 8', ', "A100"'),
        dump(TABLE).replace("2026-11-22T12:00:00+00:00", "yesterday"),
        dump(TABLE).replace("2026-11-22T12:00:00+00:00", "2026-11-22"),
    ],
)
def test_whatever_is_no_table_is_a_value_error(text: str) -> None:
    """Damaged files and files of other versions all raise ValueError."""
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    """Every cloud has its own file, so writing one cloud's prices does not make another's look newer."""
    folder = tmp_path / "new" / "folder"
    store.write_cache("gcp", TABLE, folder=folder)
    assert store.load_cached("gcp", folder=folder) == TABLE
    assert store.load_cached("lambda", folder=folder) is None
    assert [path.name for path in folder.iterdir()] == ["gcp.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"format": 0}'])
def test_a_damaged_cache_is_as_good_as_none(tmp_path: Path, damage: bytes) -> None:
    """A damaged cache file is ignored, and overwritten the next time."""
    (tmp_path / "gcp.json").write_bytes(damage)
    assert store.load_cached("gcp", folder=tmp_path) is None
    store.write_cache("gcp", TABLE, folder=tmp_path)
    assert store.load_cached("gcp", folder=tmp_path) == TABLE


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """With a read-only home, or a file in place of the folder, prices are just not cached."""
    (tmp_path / "file").write_text("")
    store.write_cache("gcp", TABLE, folder=tmp_path / "file" / "prices")
    assert store.load_cached("gcp", folder=tmp_path / "file" / "prices") is None


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (timedelta(0), True),
        (timedelta(hours=23, minutes=59), True),
        (timedelta(hours=24), False),
        (timedelta(days=400), False),
        (timedelta(seconds=-1), False),
    ],
)
def test_a_day_makes_prices_old(age: timedelta, *, expected: bool) -> None:
    """Prices are fresh for less than 24 hours; a time in the future, from a clock that was set back, is not fresh."""
    assert store.is_fresh(TABLE, now=NOW + age) is expected


def test_every_row_of_the_snapshot_is_an_offer() -> None:
    """Every GPU of the snapshot is in the GPU table, and every row has a plausible price."""
    rows = read(store.SNAPSHOT).rows
    assert {row.infra for row in rows} == {"gcp", "lambda"}
    for row in rows:
        assert known_gpu(row.accelerator), row
        offer = offer_of(row)
        assert offer is not None, row
        assert (offer.shape.node, offer.shape.count) == (row.instance_type, row.gpus)
        assert row.usd_per_h is not None, row
        assert row.usd_per_h > 0.1
        assert row.spot_usd_per_h is None or row.spot_usd_per_h > 0.05
        assert row.infra != "lambda" or row.spot_usd_per_h is None


def test_the_snapshot_has_one_row_for_a_type_in_a_region() -> None:
    """Zones are merged: every instance type has one row per region, with its lowest price."""
    rows = read(store.SNAPSHOT).rows
    keys = [(row.infra, row.region, row.instance_type, row.accelerator) for row in rows]
    assert len(set(keys)) == len(keys)


def test_the_snapshot_says_where_it_is_from() -> None:
    """The snapshot contains its date, its origin and the origin's licence."""
    head = json.loads(store.SNAPSHOT.read_text())
    assert "github.com/skypilot-org/skypilot-catalog" in head["source"]
    assert "Apache License 2.0" in head["source"]
    assert datetime.fromisoformat(head["taken"]) < NOW
    assert store.SNAPSHOT.stat().st_size < 64 * 1024


@pytest.mark.parametrize(
    ("infra", "region", "instance_type", "expected"),
    [
        # host and accelerator, which GCP prices apart: 8.79698 + 14.76958, 4.39824 + 15.712
        ("gcp", "us-central1", "a2-ultragpu-8g", ("A100-80GB", 8, 96, 1360.0, 23.56656, 20.11024)),
        # 5.91582 + 23.47126, 2.958 + 11.4728
        ("gcp", "us-central1", "a2-highgpu-8g", ("A100", 8, 96, 680.0, 29.38708, 14.4308)),
        ("lambda", "us-east-1", "gpu_8x_a100", ("A100", 8, 124, 1800.0, 15.92, None)),
        ("lambda", "us-west-2", "gpu_8x_a100_80gb_sxm4", ("A100-80GB", 8, 240, 1800.0, 22.32, None)),
    ],
)
def test_known_prices_are_in_the_snapshot(
    infra: str, region: str, instance_type: str, expected: tuple[object, ...]
) -> None:
    """Some prices equal sums that were made by hand from the catalog's rows."""
    table = store.load_snapshot(infra)
    assert table is not None
    (row,) = [row for row in table.rows if (row.region, row.instance_type) == (region, instance_type)]
    assert row[3:] == pytest.approx(expected, abs=1e-9)


def test_a_cloud_that_is_not_shipped_has_no_snapshot() -> None:
    """The snapshot has two clouds; only SkyPilot has prices of the others."""
    assert store.load_snapshot("aws") is None


@pytest.mark.parametrize(
    ("infra", "instance_type", "accelerator", "board"),
    [
        ("lambda", "gpu_1x_a100", "A100", "A100-PCIE"),
        ("lambda", "gpu_4x_a100", "A100", "A100-PCIE"),
        ("lambda", "gpu_1x_a100_sxm4", "A100", None),
        ("lambda", "gpu_8x_a100", "A100", None),
        ("lambda", "gpu_1x_h100_pcie", "H100", "H100-PCIE"),
        ("lambda", "gpu_8x_h100_sxm5", "H100", None),
        ("gcp", "a2-highgpu-1g", "A100", None),
        ("runpod", "1x_A100-80GB_SECURE", "A100-80GB", "A100-80GB-PCIE"),
        ("runpod", "1x_A100-80GB-SXM_SECURE", "A100-80GB-SXM", None),
    ],
)
def test_an_offer_tells_boards_of_one_name_apart(
    infra: str, instance_type: str, accelerator: str, board: str | None
) -> None:
    """SkyPilot has one name for PCIe and SXM boards, but their peak rates and links differ."""
    offer = offer_of(A100._replace(infra=infra, instance_type=instance_type, accelerator=accelerator))
    assert offer is not None
    assert (offer.shape.board, offer.shape.accelerator) == (board, accelerator)


def test_what_is_no_gpu_of_the_table_is_no_offer() -> None:
    """TPUs and other makers' accelerators are for rent too, but the trainer cannot use them."""
    assert offer_of(L4._replace(accelerator="tpu-v5e-8")) is None
    assert offer_of(L4._replace(accelerator="MI300X")) is None

"""Data files in a bucket are downloaded to a node, counted by the plan, and checked by the doctor."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.doctor.hub import check_data
from launcher.plan import plan
from launcher.plan.plan import find_workload
from trainer.bucket import Bucket, open_file
from trainer.errors import BucketError, DataError
from trainer.recipe import Recipe, load
from trainer.supervisor.transfers import fetch_data

ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(params=["s3", "gcs"])
def data(request: pytest.FixtureRequest) -> str:
    """The URI of a file with five rows."""
    uri = f"{request.getfixturevalue(request.param)}/data/pairs.jsonl"
    bucket, key = open_file(uri)
    bucket.put(key, (ROW * 5).encode())
    return uri


def recipe(*data: str) -> Recipe:
    return load("zephyr-tiny/dpo", [f"dataset_mixture={data[0]}", *data[1:]]).recipe


def test_a_node_gets_the_file_under_its_own_name(data: str, tmp_path: Path) -> None:
    """A file is downloaded once, however often the recipe names it. The recorded recipe keeps the address."""
    wanted = recipe(data, f"test_dataset={data}")
    found = fetch_data(wanted, tmp_path).dataset_mixture
    assert {each.id for each in (*found.datasets, *found.test_datasets)} == {str(tmp_path / "0/pairs.jsonl")}
    assert (tmp_path / "0/pairs.jsonl").read_text() == ROW * 5
    assert wanted.dataset_mixture.datasets[0].id == data


def test_other_data_is_left_where_it_is(tmp_path: Path) -> None:
    """Local files, data sets of the Hub and generated data are not changed."""
    wanted = recipe("some/data")
    assert fetch_data(wanted, tmp_path) == wanted
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(data: str, tmp_path: Path) -> None:
    """The node, the plan and the doctor report a missing file with its full address."""
    wanted = recipe(data.replace("pairs", "pears"))
    with pytest.raises(DataError, match=r"there is no .*/data/pears\.jsonl"):
        fetch_data(wanted, tmp_path)
    with pytest.raises(DataError, match=r"/data/pears\.jsonl does not exist"):
        find_workload(wanted)
    found = check_data(wanted.dataset_mixture.datasets[0], {})
    assert (found.status, found.detail) == ("missing", f"{data.replace('pairs', 'pears')} does not exist")


def test_a_bucket_that_is_not_there_is_the_user_s_to_mend(s3: str) -> None:
    """A missing bucket is reported before a machine is rented."""
    with pytest.raises(BucketError, match="no-such-bucket-at-all"):
        find_workload(recipe("s3://no-such-bucket-at-all/pairs.jsonl"))


def test_the_plan_counts_its_rows(data: str) -> None:
    """The plan counts the rows like those of a local file."""
    assert find_workload(recipe(data)).rows == 5


def test_of_a_large_file_the_plan_reads_the_beginning(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan estimates the rows of a large file from its beginning and its size."""
    monkeypatch.setattr(plan, "COUNTED_BYTES", len(ROW))
    monkeypatch.setattr(Bucket, "read", lambda *_: iter([memoryview(ROW.encode()), None]))
    assert find_workload(recipe(data)).rows == 5


def test_the_doctor_sees_it(data: str) -> None:
    """The doctor checks that the file exists without reading it."""
    assert check_data(recipe(data).dataset_mixture.datasets[0], {}).status == "ok"


@pytest.mark.parametrize("name", ["s3://bucket/folder", "https://x.org/pairs.jsonl", "hf://datasets/a/b"])
def test_other_addresses_are_refused_before_anything_is_rented(name: str) -> None:
    """Invalid addresses are refused before the worker would fail on them."""
    with pytest.raises(DataError, match="is not a data file in a bucket"):
        recipe(name)

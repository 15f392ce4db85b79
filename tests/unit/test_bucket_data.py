"""Data files that lie in a bucket: brought to a node, counted by the plan, looked at by the doctor."""

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
    """URI of a file of five rows."""
    uri = f"{request.getfixturevalue(request.param)}/data/pairs.jsonl"
    bucket, key = open_file(uri)
    bucket.put(key, (ROW * 5).encode())
    return uri


def recipe(*data: str) -> Recipe:
    return load("zephyr-tiny/dpo", [f"dataset_mixture={data[0]}", *data[1:]]).recipe


def test_a_node_gets_the_file_under_its_own_name(data: str, tmp_path: Path) -> None:
    """Once, however often it is named; the recipe that is recorded keeps the address."""
    wanted = recipe(data, f"test_dataset={data}")
    found = fetch_data(wanted, tmp_path).dataset_mixture
    assert {each.id for each in (*found.datasets, *found.test_datasets)} == {str(tmp_path / "0/pairs.jsonl")}
    assert (tmp_path / "0/pairs.jsonl").read_text() == ROW * 5
    assert wanted.dataset_mixture.datasets[0].id == data


def test_other_data_is_left_where_it_is(tmp_path: Path) -> None:
    """Files of the node, the Hub's, and what is generated."""
    wanted = recipe("some/data")
    assert fetch_data(wanted, tmp_path) == wanted
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(data: str, tmp_path: Path) -> None:
    """By the node, by the plan and by the doctor, with its whole address."""
    wanted = recipe(data.replace("pairs", "pears"))
    with pytest.raises(DataError, match=r"there is no .*/data/pears\.jsonl"):
        fetch_data(wanted, tmp_path)
    with pytest.raises(DataError, match=r"/data/pears\.jsonl does not exist"):
        find_workload(wanted)
    found = check_data(wanted.dataset_mixture.datasets[0], {})
    assert (found.status, found.detail) == ("missing", f"{data.replace('pairs', 'pears')} does not exist")


def test_a_bucket_that_is_not_there_is_the_user_s_to_mend(s3: str) -> None:
    """Before anything is rented."""
    with pytest.raises(BucketError, match="no-such-bucket-at-all"):
        find_workload(recipe("s3://no-such-bucket-at-all/pairs.jsonl"))


def test_the_plan_counts_its_rows(data: str) -> None:
    """As it counts those of a file here."""
    assert find_workload(recipe(data)).rows == 5


def test_of_a_large_file_the_plan_reads_the_beginning(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows there, and the file's size, tell of all."""
    monkeypatch.setattr(plan, "COUNTED_BYTES", len(ROW))
    monkeypatch.setattr(Bucket, "read", lambda *_: iter([memoryview(ROW.encode()), None]))
    assert find_workload(recipe(data)).rows == 5


def test_the_doctor_sees_it(data: str) -> None:
    """Without reading it."""
    assert check_data(recipe(data).dataset_mixture.datasets[0], {}).status == "ok"


@pytest.mark.parametrize("name", ["s3://bucket/folder", "https://x.org/pairs.jsonl", "hf://datasets/a/b"])
def test_other_addresses_are_refused_before_anything_is_rented(name: str) -> None:
    """What only the node's worker would find out."""
    with pytest.raises(DataError, match="is not a data file in a bucket"):
        recipe(name)

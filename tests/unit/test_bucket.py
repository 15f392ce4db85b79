"""Files survive the way to folders and S3 and back, and errors have hints."""

from __future__ import annotations

import random
import traceback
from pathlib import Path

import pytest
import xxhash
from obstore.store import MemoryStore

from tests.servers.s3 import FaultyS3
from tests.servers.stores import MemoryBucket
from trainer.bucket.address import BucketAddress, Patience, parse
from trainer.bucket.byte_streams import PART_BYTES, WINDOW_BYTES, Checked, in_parallel
from trainer.bucket.store import Object, list_runs, open_run
from trainer.errors import BucketError, Unavailable

SHORT = Patience(open_s=0.5, transfer_s=0.5, request_s=2.0)


def blob(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, WINDOW_BYTES + PART_BYTES + 5])
def test_files_come_back_as_they_went(uri: str, tmp_path: Path, size: int) -> None:
    """Files of any size survive upload and download, and both return the checksum."""
    bucket = open_run(uri, "run")
    (tmp_path / "there").write_bytes(blob(size))
    expected = Checked(size, xxhash.xxh3_128_hexdigest(blob(size)))
    assert bucket.upload("a/b/file", tmp_path / "there") == expected
    assert bucket.download("a/b/file", tmp_path / "back" / "again") == expected
    assert (tmp_path / "back" / "again").read_bytes() == blob(size)


def test_only_the_first_creates(uri: str) -> None:
    """Of two creators of a key only the first succeeds, and its bytes stay."""
    bucket = open_run(uri, "run")
    assert bucket.create("attempts/0001.json", b"first")
    assert not bucket.create("attempts/0001.json", b"second")
    assert bucket.get("attempts/0001.json") == b"first"


def test_objects_are_listed_by_prefix_and_deleted_once(uri: str) -> None:
    """Listings have keys and sizes. Deleting a missing key is no error."""
    bucket = open_run(uri, "run")
    for key in ("a/2", "a/1", "ab/3"):
        bucket.put(key, key.encode() * 2)
    assert bucket.list("a/") == [Object("a/1", 6), Object("a/2", 6)]
    bucket.delete(["a/0", "a/1", "a/2"])
    bucket.delete(["a/1"])
    assert bucket.list() == [Object("ab/3", 8)]
    assert bucket.list("none/") == []


def test_a_missing_key_is_not_found(uri: str, tmp_path: Path) -> None:
    """A missing key raises FileNotFoundError, or gives None."""
    bucket = open_run(uri, "run")
    assert bucket.get_or_none("nothing") is None
    with pytest.raises(FileNotFoundError, match=r"/run/nothing$"):
        bucket.get("nothing")
    with pytest.raises(FileNotFoundError):
        bucket.download("nothing", tmp_path / "file")


def test_runs_are_listed_and_keep_to_themselves(uri: str) -> None:
    """A run does not see the objects of other runs, and its id is the last part of its address."""
    assert list_runs(uri) == []
    for name in ("b", "a.1_x-2"):
        open_run(uri, name).put("run.json", b"{}")
    assert list_runs(uri) == ["a.1_x-2", "b"]
    assert open_run(uri, "b").list() == [Object("run.json", 2)]
    assert (open_run(uri, "b").run_id, open_run(uri, "b").uri) == ("b", f"{uri}/b")


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "a b", "ü", "x" * 201])
def test_a_run_id_that_is_no_name_is_refused(tmp_path: Path, run_id: str) -> None:
    """An id that cannot be part of a key is refused before anything is written."""
    with pytest.raises(BucketError, match="cannot name a run"):
        open_run(str(tmp_path), run_id)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["", "http://host/x", "gcs://b/x", "s3:/b/x", "azure://b", "s3:///x"])
def test_an_address_that_is_none_names_the_valid_ones(uri: str) -> None:
    """A mistyped address must not become a folder of that name."""
    with pytest.raises(BucketError) as caught:
        open_run(uri, "run")
    assert "gs://bucket/prefix" in str(caught.value)


def test_addresses_are_taken_apart() -> None:
    """Extra slashes do not change an address."""
    assert parse("s3://b//x/y/") == BucketAddress("s3", "b", "x/y")
    assert parse("gs://b") == BucketAddress("gs", "b", "")
    assert parse("file:///tmp/x") == parse("/tmp/x/") == BucketAddress("file", "", "/tmp/x")
    assert str(parse("s3://b").child("run")) == "s3://b/run"
    assert str(parse("/").child("run")) == "/run"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """A file at the folder's path is an error for the user."""
    (tmp_path / "file").touch()
    with pytest.raises(BucketError, match="Not a directory"):
        open_run(f"{tmp_path}/file", "run")


def test_a_bucket_that_is_not_there_is_said_at_once(s3: str) -> None:
    """A bucket that does not exist is reported without retries."""
    with pytest.raises(BucketError, match="NoSuchBucket") as caught:
        open_run(s3.replace("test-", "none-"), "run")
    assert "create it" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "way_out"),
    [
        (403, "InvalidAccessKeyId", "are invalid"),
        (403, "SignatureDoesNotMatch", "are invalid"),
        (400, "ExpiredToken", "expired"),
        (403, "AccessDenied", "permission is missing"),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION"),
    ],
)
def test_what_the_user_has_to_mend_is_said_at_once(
    s3: str, faulty_s3: FaultyS3, status: int, code: str, way_out: str
) -> None:
    """Invalid credentials are reported with a hint and without retries."""
    faulty_s3.answer(status, code)
    with pytest.raises(BucketError) as caught:
        open_run(s3, "run")
    assert code in caught.value.message
    assert way_out in str(caught.value)
    assert len(faulty_s3.requests) == 1


def test_secrets_in_answers_are_not_passed_on(s3: str, faulty_s3: FaultyS3) -> None:
    """S3 quotes an expired token in its response, and our message must not."""
    faulty_s3.answer(400, "ExpiredToken</Code><Token-0>s3cr3t</Token-0><Code>")
    with pytest.raises(BucketError) as caught:
        open_run(s3, "run")
    assert "ExpiredToken" in str(caught.value)
    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))


def test_credentials_that_expire_on_the_way_are_no_outage(s3: str, faulty_s3: FaultyS3) -> None:
    """A transfer that the store refuses is not retried for minutes."""
    bucket = open_run(s3, "run")
    faulty_s3.answer(400, "ExpiredToken")
    with pytest.raises(BucketError, match="ExpiredToken"):
        bucket.put("events/0001.jsonl", b"")


def test_an_endpoint_where_nobody_answers_is_unavailable(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bounded number of retries the error is Unavailable, so the run can be recovered."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"cannot open s3://.*sending request"):
        open_run(s3, "run", patience=SHORT)


@pytest.mark.parametrize("variables", [["AWS_ACCESS_KEY_ID"], ["AWS_SECRET_ACCESS_KEY"]])
def test_missing_credentials_name_their_variables(
    s3: str, monkeypatch: pytest.MonkeyPatch, variables: list[str]
) -> None:
    """One key of a pair counts as missing credentials."""
    for name in variables:
        monkeypatch.delenv(name)
    with pytest.raises(BucketError, match="Missing") as caught:
        open_run(s3, "run", patience=SHORT)
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(caught.value)


def test_gcs_without_credentials_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing credentials file is reported before any request."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")
    with pytest.raises(BucketError, match="service account file") as caught:
        open_run("gs://bucket/runs", "run")
    assert "gcloud auth application-default login" in str(caught.value)


@pytest.mark.parametrize("fault", ["cut", "truncate", "busy"])
def test_a_fault_that_passes_is_not_noticed(s3: str, faulty_s3: FaultyS3, tmp_path: Path, fault: str) -> None:
    """A lost connection costs a retry and no data."""
    bucket = open_run(s3, "run")
    (tmp_path / "there").write_bytes(blob(PART_BYTES + 1))
    match fault:
        case "cut":
            rule = faulty_s3.cut("GET|PUT", "file", times=2)
        case "truncate":
            rule = faulty_s3.truncate("file", times=1)
        case _:
            rule = faulty_s3.answer(503, "SlowDown", times=3)
    sent = bucket.upload("file", tmp_path / "there")
    assert bucket.download("file", tmp_path / "back") == sent
    assert (tmp_path / "back").read_bytes() == blob(PART_BYTES + 1)
    assert rule.hits == rule.times


def test_a_fault_that_stays_is_unavailable(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """Retries end, and the error names the operation that failed."""
    bucket = open_run(s3, "run", patience=SHORT)
    (tmp_path / "there").write_bytes(b"x")
    faulty_s3.answer(500, "InternalError")
    with pytest.raises(Unavailable, match=r"cannot write s3://.*/run/file: 500 InternalError"):
        bucket.upload("file", tmp_path / "there")
    with pytest.raises(Unavailable, match="cannot read"):
        bucket.download("file", tmp_path / "back")
    assert len(faulty_s3.requests) > 3


def test_a_flipped_bit_shows_in_the_checksum(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """The checksum of a download is that of the received bytes."""
    bucket = open_run(s3, "run")
    (tmp_path / "there").write_bytes(blob(1000))
    sent = bucket.upload("file", tmp_path / "there")
    faulty_s3.flip_bit("file")
    got = bucket.download("file", tmp_path / "back")
    assert got.size == sent.size
    assert got.xxh3 == xxhash.xxh3_128_hexdigest((tmp_path / "back").read_bytes()) != sent.xxh3


def test_large_files_go_up_in_parts(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """A file larger than a part is never in memory as a whole."""
    bucket = open_run(s3, "run")
    (tmp_path / "there").write_bytes(blob(2 * PART_BYTES + 1))
    bucket.upload("file", tmp_path / "there")
    parts = [seen.query for seen in faulty_s3.requests if seen.method == "PUT"]
    assert len(parts) == 3
    assert all("partNumber=" in query for query in parts)


def test_a_folder_sees_no_upload_that_was_cut_short(tmp_path: Path) -> None:
    """If a file cannot be read to its end, no object is created."""
    bucket = open_run(str(tmp_path / "bucket"), "run")
    with pytest.raises(IsADirectoryError):
        bucket.upload("file", tmp_path)
    assert bucket.list() == []


def test_parallel_work_keeps_the_order_and_raises_the_first_failure() -> None:
    """Results have the order of the items, and the first failure is raised."""
    assert in_parallel(lambda number: number * 2, range(20), threads=3) == list(range(0, 40, 2))
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda number: 1 // number, [1, 0, 2], threads=2)


def test_buckets_over_one_store_share_it() -> None:
    """Two fake buckets over one store see the same objects, like two machines."""
    store = MemoryStore()
    MemoryBucket(store).put("key", b"data")
    assert MemoryBucket(store).get("key") == b"data"

"""A bucket that is a folder on the same disk: files are linked into it, not copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from trainer.bucket import open_run

DATA = bytes(range(256)) * 1000


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    path = tmp_path / "staged"
    path.write_bytes(DATA)
    return path


def test_a_file_on_the_same_disk_is_linked_and_summed(tmp_path: Path, staged: Path) -> None:
    """No byte is copied, the checksum is of the bytes that lie there, and the bucket keeps its own name."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    sent = bucket.upload("checkpoints/a/model-00001.safetensors", staged)
    there = tmp_path / "runs/r/checkpoints/a/model-00001.safetensors"
    assert there.samefile(staged)
    assert sent == (len(DATA), xxhash.xxh3_128_hexdigest(DATA))
    staged.unlink()
    assert bucket.get("checkpoints/a/model-00001.safetensors") == DATA


def test_what_is_written_again_does_not_reach_the_linked_file(tmp_path: Path, staged: Path) -> None:
    """The bucket replaces files: another upload or put of the key leaves the staged file as it was."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    bucket.upload("a/file", staged)
    bucket.put("a/file", b"other")
    assert staged.read_bytes() == DATA
    bucket.upload("a/file", staged)
    assert bucket.get("a/file") == DATA
    assert [item.key for item in bucket.list("a/")] == ["a/file"]


def test_a_key_that_the_store_spells_in_its_own_way_is_left_to_it(tmp_path: Path, staged: Path) -> None:
    """What was uploaded is found under the key that it was given."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    bucket.upload("a/50%~done", staged)
    assert bucket.get("a/50%~done") == DATA


def test_a_file_on_another_disk_is_copied(tmp_path: Path) -> None:
    """Links do not cross file systems; from tmpfs the bytes are copied as ever."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is not there, or is no other file system")
    path = shm / f"aeolus-test-{tmp_path.name}"
    path.write_bytes(DATA)
    try:
        bucket = open_run(str(tmp_path / "runs"), "r")
        assert bucket.upload("a/file", path).size == len(DATA)
    finally:
        path.unlink()
    assert bucket.get("a/file") == DATA

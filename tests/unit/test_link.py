"""Uploads to a bucket that is a folder on the same disk create hard links instead of copies."""

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


def test_a_file_on_the_same_disk_is_linked_and_has_a_checksum(tmp_path: Path, staged: Path) -> None:
    """No byte is copied, the checksum is that of the file, and the bucket's file survives the removal of the other one."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    sent = bucket.upload("checkpoints/a/model-00001.safetensors", staged)
    linked = tmp_path / "runs/r/checkpoints/a/model-00001.safetensors"
    assert linked.samefile(staged)
    assert sent == (len(DATA), xxhash.xxh3_128_hexdigest(DATA))
    staged.unlink()
    assert bucket.get("checkpoints/a/model-00001.safetensors") == DATA


def test_a_second_write_does_not_change_the_linked_file(tmp_path: Path, staged: Path) -> None:
    """The bucket replaces its file, so another upload or put of the key leaves the staged file unchanged."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    bucket.upload("a/file", staged)
    bucket.put("a/file", b"other")
    assert staged.read_bytes() == DATA
    bucket.upload("a/file", staged)
    assert bucket.get("a/file") == DATA
    assert [item.key for item in bucket.list("a/")] == ["a/file"]


def test_a_key_with_special_characters_is_copied_by_the_store(tmp_path: Path, staged: Path) -> None:
    """The store escapes such keys, and the file is found under the original key."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    bucket.upload("a/50%~done", staged)
    assert bucket.get("a/50%~done") == DATA


def test_a_file_on_another_disk_is_copied(tmp_path: Path) -> None:
    """Hard links cannot cross file systems, so a file on tmpfs is copied."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm does not exist or is on the same file system")
    path = shm / f"aeolus-test-{tmp_path.name}"
    path.write_bytes(DATA)
    try:
        bucket = open_run(str(tmp_path / "runs"), "r")
        assert bucket.upload("a/file", path).size == len(DATA)
    finally:
        path.unlink()
    assert bucket.get("a/file") == DATA

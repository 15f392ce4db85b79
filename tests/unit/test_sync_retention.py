"""Retention deletes old checkpoints, and files that no manifest names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.servers.stores import MemoryBucket
from tests.unit.test_sync import bucket, no_rejects, save
from trainer.bucket import Bucket, open_run
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import commit
from trainer.bucket.layout import commit_key, step_prefix
from trainer.bucket.manifest import committed
from trainer.bucket.restore import restore
from trainer.bucket.retention import prune
from trainer.errors import Superseded
from trainer.staged import Staged

__all__ = ["bucket"]


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [40, 50]), (2, [40, 50]), (3, [30, 40, 50]), (9, [10, 20, 30, 40, 50])]
)
def test_old_checkpoints_go_with_their_files(
    bucket: Bucket, tmp_path: Path, keep: int, left: list[int]
) -> None:
    """The newest checkpoints stay, at least two. All files of the others are deleted."""
    attempt = claim(bucket, {})
    save(bucket, attempt, tmp_path, 10, 20, 30, 40, 50)
    assert prune(bucket, attempt, keep) == sorted({10, 20, 30, 40, 50} - set(left))
    assert sorted(manifest.step for manifest in committed(bucket)) == left
    prefixes = {key.rpartition("step-")[2][:8] for key, _ in bucket.list("checkpoints/")}
    assert prefixes == {f"{step:08d}" for step in left}
    assert restore(bucket, tmp_path / "restored", no_rejects) is not None


def test_a_broken_checkpoint_does_not_count_as_kept(bucket: Bucket, tmp_path: Path) -> None:
    """Two complete checkpoints stay, whatever damaged ones are between them."""
    attempt = claim(bucket, {})
    manifests = save(bucket, attempt, tmp_path, 10, 20, 30, 40)
    bucket.delete([manifests[2].prefix + "empty"])
    bucket.put(commit_key(20), b"{")
    bucket.put(commit_key(99), b"{")
    assert prune(bucket, attempt, 2) == [20, 30]
    assert [manifest.step for manifest in committed(bucket)] == [40, 10]
    assert bucket.get_or_none(commit_key(99)) == b"{"


def test_a_checkpoint_that_did_not_verify_does_not_count_as_kept(bucket: Bucket, tmp_path: Path) -> None:
    """A checkpoint that the attempt has rejected does not count, although its sizes are right. A new commit of the step counts."""
    save(bucket, claim(bucket, {}), tmp_path, 10, 20)
    second = claim(bucket, {})
    save(bucket, second, tmp_path, 15)
    assert prune(bucket, second, 2, rejected=[20]) == []
    save(bucket, second, tmp_path, 20)
    assert prune(bucket, second, 2, rejected=[20]) == [10]
    assert [manifest.step for manifest in committed(bucket)] == [20, 15]


def test_what_was_never_committed_goes_when_nobody_can_be_writing_it(tmp_path: Path) -> None:
    """Uncommitted files of earlier attempts below the newest commit are deleted; all others stay."""
    bucket = MemoryBucket()
    first, second = claim(bucket, {}), claim(bucket, {})
    save(bucket, Attempt(bucket, second.number), tmp_path, 20, 40)
    garbage = ["step-00000010/0001/a", "step-00000020/0001/a", "step-00000030/0002/a"]
    kept = [
        "step-00000040/0001/a",
        "step-00000050/0001/a",
        "step-00000030/0003/a",
        "step-00000060/0002/a",
        "note",
    ]
    for key in garbage + kept:
        bucket.put(f"checkpoints/{key}", b"x")
    assert first.number < second.number
    assert prune(bucket, second, 2) == []
    left = {key.removeprefix("checkpoints/") for key, size in bucket.list("checkpoints/") if size == 1}
    assert left == set(kept)


def test_a_folder_keeps_nothing_of_uploads_that_were_cut_short(tmp_path: Path) -> None:
    """Partial files of killed processes are in no listing, and would fill the disk over time."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    checkpoints = tmp_path / "runs" / "r" / "checkpoints"
    claim(bucket, {})
    attempt = claim(bucket, {})
    begun = [f"step-{step:08d}/{owner:04d}" for step, owner in ((10, 1), (20, 2), (30, 1), (50, 2), (50, 3))]
    for folder in begun:
        (checkpoints / folder).mkdir(parents=True)
        (checkpoints / folder / "rank-00000.safetensors#1").write_bytes(b"cut short")
    assert not bucket.list("checkpoints/")
    save(bucket, attempt, tmp_path, 20, 30, 40)
    prune(bucket, attempt, 2)
    left = [path.relative_to(checkpoints).as_posix() for path in sorted(checkpoints.glob("*/*"))]
    assert left == ["step-00000030/0002", "step-00000040/0002", "step-00000050/0002", "step-00000050/0003"]
    assert [path.name for path in sorted(checkpoints.iterdir())] == [
        f"step-{step:08d}" for step in (30, 40, 50)
    ]
    assert restore(bucket, tmp_path / "restored", no_rejects) is not None


def test_a_link_in_a_staged_folder_is_committed_as_the_file_that_it_names(tmp_path: Path) -> None:
    """The target of a symbolic link is deleted later, so the bucket gets a copy of the file."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    folder = tmp_path / "staging" / "checkpoint-1"
    folder.mkdir(parents=True)
    (tmp_path / "cache").write_bytes(b"weights")
    (folder / "weights").symlink_to(tmp_path / "cache")
    commit(bucket, claim(bucket, {}), tmp_path / "staging", Staged(folder="checkpoint-1", step=1), "digest")
    shutil.rmtree(folder)
    (tmp_path / "cache").unlink()
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert (restored.path / "weights").read_bytes() == b"weights"


def test_the_replaced_files_of_a_kept_step_go_in_the_end(tmp_path: Path) -> None:
    """If a step was committed twice, the replaced files are deleted."""
    bucket = MemoryBucket()
    save(bucket, claim(bucket, {}), tmp_path, 10, 20)
    newer = claim(bucket, {})
    save(bucket, newer, tmp_path, 20, 30)
    assert prune(bucket, newer, 3) == []
    assert {key.split("/")[2] for key, _ in bucket.list(step_prefix(20))} == {"0002"}


def test_a_superseded_attempt_deletes_nothing(bucket: Bucket, tmp_path: Path) -> None:
    """A superseded attempt deletes no checkpoint of its successor."""
    older = claim(bucket, {})
    save(bucket, older, tmp_path, 10, 20, 30)
    claim(bucket, {})
    before = bucket.list()
    with pytest.raises(Superseded):
        prune(bucket, older, 2)
    assert bucket.list() == before

"""A checkpoint of several nodes is committed only after every node has uploaded its part."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.servers.stores import MemoryBucket
from trainer.bucket import Bucket, open_run
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import Node, Skipped, Waiting, commit, gather, upload_part
from trainer.bucket.manifest import Manifest, committed
from trainer.bucket.restore import restore
from trainer.bucket.retention import prune
from trainer.bucket.uploader import Uploader
from trainer.errors import Superseded, Unavailable
from trainer.staged import Staged, mark_staged

NODES = 3


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def stage(root: Path, node: int, step: int, **files: str) -> Staged:
    """Stage a node's folder: a file of its own, and the given files."""
    folder = root / f"node-{node}" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, text in {rank_file(node): f"node {node}, step {step}", **files}.items():
        (folder / name).write_text(text)
    return Staged(folder=folder.name, step=step)


def upload(bucket: Bucket, attempt: Attempt, root: Path, node: int, step: int, **files: str) -> None:
    upload_part(bucket, attempt, root / f"node-{node}", stage(root, node, step, **files), node=node)


def lead(bucket: Bucket, attempt: Attempt, root: Path, step: int, waiting: Waiting, **files: str) -> Manifest:
    """Commit as node 0."""
    staged = stage(root, 0, step, **files)
    return commit(
        bucket,
        attempt,
        root / "node-0",
        staged,
        "digest",
        others=lambda: gather(bucket, attempt, staged, nodes=NODES, waiting=waiting),
    )


def never(_seconds: float) -> None:
    pytest.fail("it waited")


def test_a_commit_holds_every_nodes_files(uri: str, tmp_path: Path) -> None:
    """A restored checkpoint has the files of all nodes, each file once."""
    bucket = open_run(uri, "run")
    attempt = claim(bucket, {})
    for node in (1, 2):
        upload(bucket, attempt, tmp_path, node, 10, config="alike")
    lead(bucket, attempt, tmp_path, 10, Waiting(sleep=never), config="alike")
    restored = restore(bucket, tmp_path / "restored", lambda *why: pytest.fail(str(why)))
    assert restored
    assert {path.name: path.read_text() for path in restored.path.iterdir()} == {
        "config": "alike",
        **{rank_file(node): f"node {node}, step 10" for node in range(NODES)},
    }


def test_nothing_is_a_checkpoint_before_the_last_part(tmp_path: Path) -> None:
    """There is no commit while a node is still uploading, and there is one once its part is complete."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    upload(bucket, attempt, tmp_path, 1, 10)
    seen: list[list[Manifest]] = []

    def slowly(_seconds: float) -> None:
        seen.append(committed(bucket))
        upload(bucket, attempt, tmp_path, 2, 10)

    lead(bucket, attempt, tmp_path, 10, Waiting(sleep=slowly))
    assert seen == [[]]
    assert [manifest.step for manifest in committed(bucket)] == [10]


def test_a_node_that_never_comes_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    """The wait has a timeout, and the error has the node, the step and the time."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    upload(bucket, attempt, tmp_path, 1, 10)
    slept: list[float] = []
    with pytest.raises(Unavailable, match="step 10 is not committed: no part of node 2 of 3 in 5 s"):
        lead(bucket, attempt, tmp_path, 10, Waiting(patience_s=5, sleep=slept.append))
    assert slept[0] < 0.2
    assert slept[-1] == 2.0
    assert sum(slept) >= 5
    assert committed(bucket) == []


def test_a_node_that_left_the_step_out_is_not_waited_for(tmp_path: Path) -> None:
    """A slow node may drop a checkpoint for a newer one; then node 0 skips it too."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    upload(bucket, attempt, tmp_path, 1, 10)
    for node in (1, 2):
        upload(bucket, attempt, tmp_path, node, 20)
    with pytest.raises(Skipped, match="node 2 left step 10 out and uploaded step 20"):
        lead(bucket, attempt, tmp_path, 10, Waiting(sleep=never))
    lead(bucket, attempt, tmp_path, 20, Waiting(sleep=never))
    assert [manifest.step for manifest in committed(bucket)] == [20]


def test_two_nodes_that_write_one_name_differently_commit_nothing(tmp_path: Path) -> None:
    """The bucket has only one of the two files, so nothing is committed, and the error has both checksums."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    for node in (1, 2):
        upload(bucket, attempt, tmp_path, node, 10, model=f"of node {node}")
    with pytest.raises(ValueError, match=r"two nodes wrote model: 9 bytes with xxh3 \w+, and 9 with"):
        lead(bucket, attempt, tmp_path, 10, Waiting(sleep=never))
    assert committed(bucket) == []


def test_a_superseded_attempt_neither_uploads_a_part_nor_waits_for_one(tmp_path: Path) -> None:
    """Every node checks that its attempt owns the run, and node 0 also while it waits."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})

    def taken_over(_seconds: float) -> None:
        claim(bucket, {})

    with pytest.raises(Superseded):
        lead(bucket, attempt, tmp_path, 10, Waiting(sleep=taken_over))
    with pytest.raises(Superseded):
        upload(bucket, attempt, tmp_path, 1, 10)
    assert not [object_.key for object_ in bucket.list("checkpoints/") if ".parts" in object_.key]


def test_parts_go_with_their_checkpoint(tmp_path: Path) -> None:
    """Retention deletes all parts of a checkpoint, also of one that was never committed."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    upload(bucket, attempt, tmp_path, 1, 5)
    for step in (10, 20, 30):
        for node in (1, 2):
            upload(bucket, attempt, tmp_path, node, step)
        lead(bucket, attempt, tmp_path, step, Waiting(sleep=never))
    prune(bucket, attempt, 2)
    left = {object_.key.split("/")[1] for object_ in bucket.list("checkpoints/")}
    assert left == {"step-00000020", "step-00000030"}


class _Told:
    """Records the uploader's callbacks in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def committing(self) -> None:
        self.said.append("committing")

    def committed(self, manifest: Manifest, seconds: float) -> None:
        self.said.append(f"committed {manifest.step} with {len(manifest.files)} files")

    def dropped(self, step: int) -> None:
        self.said.append(f"dropped {step}")

    def upload_failed(self, step: int, reason: str) -> None:
        self.said.append(f"failed {step}: {reason}")


def test_uploaders_of_two_nodes_make_one_checkpoint(uri: str, tmp_path: Path) -> None:
    """Node 1 uploads its part and reports no commit; node 0 commits both parts."""
    buckets = [open_run(uri, "run"), open_run(uri, "run")]
    attempt = claim(buckets[0], {})
    told = [_Told(), _Told()]
    for node in (0, 1):
        mark_staged(tmp_path / f"node-{node}", stage(tmp_path, node, 10))
    uploaders = [
        Uploader(
            buckets[node],
            attempt,
            tmp_path / f"node-{node}",
            recipe_digest="digest",
            keep=2,
            listener=told[node],
            node=Node(node, 2),
        )
        for node in (0, 1)
    ]
    for uploader in uploaders:
        uploader.start()
    threads = [threading.Thread(target=uploader.drain, args=(30,)) for uploader in uploaders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for uploader in uploaders:
        uploader.stop()
    assert [told_.said for told_ in told] == [["committing", "committed 10 with 2 files"], []]

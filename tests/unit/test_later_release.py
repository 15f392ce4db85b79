"""A run has a checkpoint that only a later release can read: this release says so, and neither uses nor deletes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.servers.stores import MemoryBucket
from tests.unit.test_checkpoints import RUN, Type, launcher
from tests.unit.test_sync import no_rejects, save, stage
from trainer.bucket import Bucket, open_run
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import commit
from trainer.bucket.layout import FINAL_COMMIT_KEY, RUN_KEY, commit_key
from trainer.bucket.manifest import committed, final
from trainer.bucket.restore import restore, restore_named
from trainer.bucket.retention import prune
from trainer.errors import ExitCode, UserError
from trainer.supervisor.export import ExportRequest, export

__all__ = ["launcher"]

REASON = r"has checkpoint format 3 of release 9\.9, but this release reads formats up to 2"


def rewrite(bucket: Bucket, key: str) -> None:
    """Rewrite a manifest as release 9.9 would write it."""
    manifest = json.loads(bucket.get(key))
    later = {**manifest, "format": 3, "release": "9.9", "new": "field"}
    bucket.put(key, json.dumps(later).encode())


@pytest.fixture
def runs(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


@pytest.fixture
def bucket(runs: str, tmp_path: Path) -> Bucket:
    """A run with checkpoints 2, 4 and 6, of which release 9.9 wrote the newest."""
    bucket = open_run(runs, RUN)
    bucket.put(RUN_KEY, b"{}")
    save(bucket, claim(bucket, {}), tmp_path / "staging", 2, 4, 6)
    rewrite(bucket, commit_key(6))
    return bucket


def test_a_commit_names_its_format_and_release(tmp_path: Path) -> None:
    """A manifest has the format that the worker staged. One without a number is of format 1."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    staged = stage(tmp_path, 2).model_copy(update={"format": 2})
    assert commit(bucket, attempt, tmp_path, staged, "digest").format == 2
    old = json.loads(bucket.get(commit_key(2)))
    assert old.pop("release")
    del old["format"]
    bucket.put(commit_key(2), json.dumps(old).encode())
    assert [(manifest.format, manifest.is_known) for manifest in committed(bucket)] == [(1, True)]


def test_a_recovery_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    """The older checkpoints are intact, but the run would lose steps. So it ends and names the release."""
    with pytest.raises(UserError, match=REASON) as refused:
        restore(bucket, tmp_path / "restored", no_rejects)
    assert refused.value.exit_code == ExitCode.CONFIG
    assert commit_key(6) in refused.value.message
    assert "install that release or a later one" in str(refused.value.hint)
    assert not (tmp_path / "restored").exists()


def test_a_recovery_of_another_node_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    """A node that is told the step to restore refuses too."""
    with pytest.raises(UserError, match=REASON):
        restore_named(bucket, 6, 1, tmp_path / "restored")


def test_a_recovery_above_it_is_not_refused(bucket: Bucket, tmp_path: Path) -> None:
    """Only the newest checkpoint matters: this release reads the checkpoint that was committed afterwards."""
    save(bucket, claim(bucket, {}), tmp_path / "staging", 8)
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert restored.manifest.step == 8


def test_the_list_shows_it(runs: str, bucket: Bucket, launcher: Type) -> None:
    """It is neither whole nor broken, and the list names the release."""
    rows = launcher("list", f"{runs}/{RUN}", "--json").json["checkpoints"]
    assert [(row["step"], row["state"]) for row in rows] == [(6, "unknown"), (4, "whole"), (2, "whole")]
    answer = launcher("list", f"{runs}/{RUN}")
    assert answer.code == 0
    assert "unknown: commits/step-00000006.json" in answer.out
    assert "release 9.9" in answer.out


def test_it_is_not_verified(runs: str, bucket: Bucket, launcher: Type) -> None:
    """Its files match the manifest, but this release cannot tell whether they are all. The other checkpoints verify."""
    answer = launcher("verify", f"{runs}/{RUN}", "--json")
    states = [row["state"] for row in answer.json["checkpoints"]]
    assert (answer.code, answer.json["verified"], states) == (1, False, ["unknown", "verified", "verified"])
    answer = launcher("verify", f"{runs}/{RUN}", "--step", "6")
    assert answer.code == 1
    assert "unknown: commits/step-00000006.json" in answer.out
    assert launcher("verify", f"{runs}/{RUN}", "--step", "4").code == 0


@pytest.mark.parametrize("options", [[], ["--step", "6"]], ids=["newest", "step"])
def test_it_is_not_pulled(
    runs: str, bucket: Bucket, tmp_path: Path, launcher: Type, options: list[str]
) -> None:
    """An older checkpoint does not take its place, unless it is named."""
    answer = launcher("pull", f"{runs}/{RUN}", tmp_path / "here", *options)
    assert (answer.code, answer.out) == (2, "")
    assert "release 9.9" in answer.err
    assert not (tmp_path / "here").exists()
    assert launcher("pull", f"{runs}/{RUN}", tmp_path / "here", "--step", "4", "--json").json["step"] == 4


@pytest.mark.parametrize("step", [None, 6], ids=["newest", "step"])
def test_it_is_not_exported(runs: str, bucket: Bucket, tmp_path: Path, step: int | None) -> None:
    """An older checkpoint does not take its place. The refusal comes before anything is downloaded."""
    request = ExportRequest(step=step, into=tmp_path / "model")
    with pytest.raises(UserError, match=REASON):
        export(f"{runs}/{RUN}", request)
    assert not (tmp_path / "model").exists()


def test_retention_keeps_it(bucket: Bucket, tmp_path: Path) -> None:
    """It stays with its files when this release has committed newer checkpoints. Older ones that it can read go."""
    attempt = claim(bucket, {})
    save(bucket, attempt, tmp_path / "staging", 8, 10, 12)
    assert prune(bucket, attempt, 2) == [2, 4, 8]
    assert [manifest.step for manifest in committed(bucket)] == [12, 10, 6]
    assert bucket.get("checkpoints/step-00000006/0001/model.safetensors")


def test_retention_does_not_count_it(bucket: Bucket, tmp_path: Path) -> None:
    """Two checkpoints that this release can read stay beside it."""
    assert prune(bucket, Attempt(bucket, 1), 2) == []
    assert [manifest.step for manifest in committed(bucket)] == [6, 4, 2]


def test_a_prune_by_hand_keeps_it(runs: str, bucket: Bucket, tmp_path: Path, launcher: Type) -> None:
    """`launcher checkpoints prune` deletes what retention deletes."""
    save(bucket, Attempt(bucket, 1), tmp_path / "staging", 8, 10)
    output = launcher("prune", f"{runs}/{RUN}", "--keep", "2", "--yes", "--json").json
    assert (output["steps"], output["kept"]) == ([2, 4], [10, 8])
    assert [manifest.step for manifest in committed(bucket)] == [10, 8, 6]


def test_a_final_model_of_a_later_release_is_not_replaced(bucket: Bucket, tmp_path: Path) -> None:
    """The run is not taken for unfinished, and a commit does not overwrite the model."""
    attempt = Attempt(bucket, 1)
    staged = stage(tmp_path / "staging", 8, kind="final")
    commit(bucket, attempt, tmp_path / "staging", staged, "digest")
    rewrite(bucket, FINAL_COMMIT_KEY)
    written = bucket.get(FINAL_COMMIT_KEY)
    with pytest.raises(UserError, match=REASON):
        final(bucket)
    with pytest.raises(UserError, match=REASON):
        commit(bucket, attempt, tmp_path / "staging", staged, "digest")
    assert bucket.get(FINAL_COMMIT_KEY) == written

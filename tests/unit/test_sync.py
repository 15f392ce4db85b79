"""Checkpoints are committed to the bucket, and restored and verified. `test_sync_retention` covers deletion."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import pytest

from tests.servers.s3 import FaultyS3
from tests.servers.stores import MemoryBucket
from trainer.bucket import Bucket, open_run
from trainer.bucket.address import Patience
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import commit
from trainer.bucket.layout import commit_key
from trainer.bucket.manifest import Manifest, committed, final
from trainer.bucket.restore import CorruptCheckpoint, fetch, restore
from trainer.errors import Superseded, Unavailable
from trainer.staged import Staged

SHORT = Patience(open_s=0.5, transfer_s=0.3, request_s=2.0)
FILES = {"model.safetensors": b"weights", "empty": b"", "global_step/rank_0.pt": b"optimizer"}


def stage(
    staging: Path, step: int, *, kind: Literal["checkpoint", "final"] = "checkpoint", mark: str = ""
) -> Staged:
    """Stage a folder like a worker. Its bytes depend on the step and on `mark`."""
    name = "final" if kind == "final" else f"checkpoint-{step}"
    for path, data in FILES.items():
        file = staging / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data and data + f" of step {step} {mark}".encode())
    return Staged(folder=name, step=step, kind=kind, details={"world_size": 1})


def save(bucket: Bucket, attempt: Attempt, staging: Path, *steps: int, mark: str = "") -> list[Manifest]:
    return [commit(bucket, attempt, staging, stage(staging, step, mark=mark), "digest") for step in steps]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def no_rejects(step: int, reason: str) -> None:
    pytest.fail(f"step {step} was rejected: {reason}")


@pytest.fixture
def bucket(uri: str) -> Bucket:
    return open_run(uri, "run")


def test_a_commit_comes_back_whole(bucket: Bucket, tmp_path: Path) -> None:
    """A recovery gets all staged files, including nested and empty ones."""
    save(bucket, claim(bucket, {}), tmp_path / "staging", 50, 100)
    restored = restore(bucket, tmp_path / "work" / "restored", no_rejects)
    assert restored is not None
    assert restored.path == tmp_path / "work" / "restored" / "checkpoint-100"
    assert contents(restored.path) == contents(tmp_path / "staging" / "checkpoint-100")
    assert restored.bytes == restored.manifest.size == sum(map(len, contents(restored.path).values()))
    assert (restored.manifest.step, restored.manifest.attempt, restored.manifest.recipe) == (100, 1, "digest")
    assert [path.name for path in restored.path.parent.iterdir()] == ["checkpoint-100"]


def test_a_store_without_conditions_or_ranges_keeps_checkpoints_too(rclone: str, tmp_path: Path) -> None:
    """A weaker S3 server gives weaker guarantees but loses no data."""
    bucket = open_run(rclone, "run")
    save(bucket, claim(bucket, {}), tmp_path, 10)
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert contents(restored.path) == contents(tmp_path / "checkpoint-10")


def test_what_a_reader_of_a_commit_needs_is_written_before_it(bucket: Bucket, tmp_path: Path) -> None:
    """The events up to a step are in the bucket before its commit, even if the machine dies then."""
    attempt = claim(bucket, {})
    seen: list[list[str]] = []

    def ready() -> None:
        seen.append([item.key.rpartition("/")[2] for item in bucket.list()])

    staged = stage(tmp_path, 10)
    commit(bucket, attempt, tmp_path, staged, "recipe", ready=ready)
    assert len(seen) == 1
    assert "step-00000010.json" not in seen[0]
    assert len(seen[0]) > 1


def test_a_run_without_checkpoints_starts_at_the_beginning(bucket: Bucket, tmp_path: Path) -> None:
    """A run without commits starts at step 0."""
    assert restore(bucket, tmp_path / "restored", no_rejects) is None


def test_the_final_model_is_committed_at_its_own_address(bucket: Bucket, tmp_path: Path) -> None:
    """The model is in `final/`, and is not used as a checkpoint."""
    attempt = claim(bucket, {})
    manifest = commit(bucket, attempt, tmp_path, stage(tmp_path, 100, kind="final"), "digest")
    assert final(bucket) == manifest
    assert bucket.get("final/model.safetensors") == b"weights of step 100 "
    assert committed(bucket) == []
    fetch(bucket, manifest, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "final")


def test_an_uncommitted_checkpoint_is_never_restored(bucket: Bucket, tmp_path: Path) -> None:
    """Files without a manifest are never restored."""
    save(bucket, claim(bucket, {}), tmp_path, 50, 100)
    bucket.delete([commit_key(100)])
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert restored.manifest.step == 50


@pytest.mark.parametrize("damage", ["lost file", "short file", "changed file", "cut manifest", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(bucket: Bucket, tmp_path: Path, damage: str) -> None:
    """The previous checkpoint is restored, and the reason names the damage."""
    manifest = save(bucket, claim(bucket, {}), tmp_path, 50, 100)[1]
    key = manifest.prefix + "model.safetensors"
    whole = bucket.get(key)
    match damage:
        case "lost file":
            bucket.delete([key])
            reasons = [key, "is missing", f"expected {len(whole)} bytes"]
        case "short file":
            bucket.put(key, whole[:-1])
            reasons = [key, f"has {len(whole) - 1} bytes", f"expected {len(whole)}"]
        case "changed file":
            bucket.put(key, b"W" + whole[1:])
            reasons = [key, f"expected {len(whole)} bytes with xxh3 {manifest.files[2].xxh3}", "got"]
        case "cut manifest":
            bucket.put(manifest.key, bucket.get(manifest.key)[:-20])
            reasons = [manifest.key, "is not a manifest", "EOF"]
        case _:
            bucket.put(manifest.key, b"<html>")
            reasons = [manifest.key, "is not a manifest", "Invalid JSON"]
    rejected: list[tuple[int, str]] = []
    restored = restore(bucket, tmp_path / "restored", lambda step, reason: rejected.append((step, reason)))
    assert restored is not None
    assert restored.manifest.step == 50
    assert [step for step, _ in rejected] == [100]
    assert all(reason in rejected[0][1] for reason in reasons), rejected
    assert [path.name for path in (tmp_path / "restored").iterdir()] == ["checkpoint-50"]


def test_a_bit_flipped_on_the_way_is_found(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """The downloaded bytes are verified, not only the sizes in the bucket."""
    bucket = open_run(s3, "run")
    save(bucket, claim(bucket, {}), tmp_path, 50, 100)
    rule = faulty_s3.flip_bit("step-00000100/.*/model.safetensors")
    rejected: list[int] = []
    restored = restore(bucket, tmp_path / "restored", lambda step, _: rejected.append(step))
    assert rule.hits == 1
    assert rejected == [100]
    assert restored is not None
    assert restored.manifest.step == 50


def test_an_outage_is_no_verdict_on_a_checkpoint(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """An unreachable store must not make a run resume from an older step, and leaves no partial folder."""
    bucket = open_run(s3, "run", patience=SHORT)
    save(bucket, claim(bucket, {}), tmp_path, 50, 100)
    faulty_s3.answer(503, "SlowDown", "GET", "step-00000100/.*/model.safetensors")
    with pytest.raises(Unavailable, match="503 SlowDown"):
        restore(bucket, tmp_path / "restored", no_rejects)
    assert list((tmp_path / "restored").iterdir()) == []


def test_when_nothing_verifies_nothing_is_restored(bucket: Bucket, tmp_path: Path) -> None:
    """All checkpoints are rejected, newest first, and the run starts at step 0."""
    for manifest in save(bucket, claim(bucket, {}), tmp_path, 50, 100):
        bucket.put(manifest.prefix + "empty", b"no longer")
    rejected: list[int] = []
    assert restore(bucket, tmp_path / "restored", lambda step, _: rejected.append(step)) is None
    assert rejected == [100, 50]


def test_fetching_never_mixes_with_what_is_there(tmp_path: Path) -> None:
    """A folder with other files is refused."""
    bucket = MemoryBucket()
    (manifest,) = save(bucket, claim(bucket, {}), tmp_path, 50)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(FileExistsError):
        fetch(bucket, manifest, tmp_path / "model")


def test_fetching_what_is_gone_is_a_corrupt_checkpoint(tmp_path: Path) -> None:
    """A file that is deleted between listing and download is reported with its name and size."""
    bucket = MemoryBucket()
    (manifest,) = save(bucket, claim(bucket, {}), tmp_path, 50)
    bucket.delete([manifest.prefix + "empty"])
    with pytest.raises(CorruptCheckpoint, match="empty is missing, expected 0 bytes"):
        fetch(bucket, manifest, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_superseded_attempt_does_not_commit(bucket: Bucket, tmp_path: Path) -> None:
    """It stops before it writes a manifest, and its successor's checkpoints stay."""
    older = claim(bucket, {})
    newer = claim(bucket, {})
    save(bucket, newer, tmp_path / "newer", 100, mark="newer")
    with pytest.raises(Superseded):
        save(bucket, older, tmp_path / "older", 100, mark="older")
    with pytest.raises(Superseded):
        commit(bucket, older, tmp_path / "older", stage(tmp_path / "older", 100, kind="final"), "digest")
    assert [manifest.attempt for manifest in committed(bucket)] == [2]
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert contents(restored.path) == contents(tmp_path / "newer" / "checkpoint-100")
    assert bucket.list("final/") == []


class FrozenAttempt(Attempt):
    """An attempt whose machine froze after it checked that it owns the run."""

    def check(self) -> None:
        """Check the bucket at the time of the callback."""


def test_a_frozen_attempt_cannot_replace_its_successors_commit(bucket: Bucket, tmp_path: Path) -> None:
    """After its last check, an older attempt still finds the newer one's manifest and stops."""
    frozen = FrozenAttempt(bucket, claim(bucket, {}).number)
    save(bucket, claim(bucket, {}), tmp_path / "newer", 100, mark="newer")
    with pytest.raises(Superseded, match=r"attempt 2 has committed commits/step-00000100\.json"):
        save(bucket, frozen, tmp_path / "older", 100, mark="older")
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert contents(restored.path) == contents(tmp_path / "newer" / "checkpoint-100")


def test_a_second_commit_of_a_step_uploads_nothing(
    s3: str, faulty_s3: FaultyS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Committed files are never written to, and the log has the reason."""
    bucket = open_run(s3, "run")
    attempt = claim(bucket, {})
    first = save(bucket, attempt, tmp_path, 100)
    before = len(faulty_s3.requests)
    with caplog.at_level(logging.INFO):
        assert save(bucket, attempt, tmp_path, 100, mark="again") == first
    assert {seen.method for seen in faulty_s3.requests[before:]} == {"GET"}
    assert "attempt 1 committed commits/step-00000100.json already: nothing is uploaded" in caplog.text


def test_an_own_commit_that_is_not_whole_is_uploaded_anew(bucket: Bucket, tmp_path: Path) -> None:
    """The manifest is deleted first, so that no manifest names files that are being written."""
    attempt = claim(bucket, {})
    (first,) = save(bucket, attempt, tmp_path, 100)
    bucket.delete([first.prefix + "model.safetensors"])
    save(bucket, attempt, tmp_path, 100)
    assert restore(bucket, tmp_path / "restored", no_rejects) is not None


@pytest.mark.parametrize("damaged", [True, False])
def test_the_same_step_of_an_earlier_attempt_is_replaced(
    bucket: Bucket, tmp_path: Path, damaged: bool
) -> None:
    """An attempt that resumed from below a commit has rejected it, so its own commit replaces it."""
    (old,) = save(bucket, claim(bucket, {}), tmp_path / "old", 100, mark="old")
    if damaged:
        bucket.put(old.prefix + "model.safetensors", bucket.get(old.prefix + "model.safetensors").upper())
    (new,) = save(bucket, claim(bucket, {}), tmp_path / "new", 100, mark="new")
    assert committed(bucket) == [new]
    restored = restore(bucket, tmp_path / "restored", no_rejects)
    assert restored is not None
    assert contents(restored.path) == contents(tmp_path / "new" / "checkpoint-100")


def test_a_final_model_is_uploaded_once(bucket: Bucket, tmp_path: Path) -> None:
    """All attempts export the same model, so only an incomplete one is uploaded again."""
    staged = stage(tmp_path, 100, kind="final")
    first = commit(bucket, claim(bucket, {}), tmp_path, staged, "digest")
    second = claim(bucket, {})
    assert commit(bucket, second, tmp_path, staged, "digest") == first
    bucket.delete(["final/model.safetensors"])
    assert commit(bucket, second, tmp_path, staged, "digest").attempt == 2
    assert final(bucket) is not None


def test_a_commit_whose_answer_was_lost_is_a_commit(s3: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    """If the retry of a conditional write finds our own manifest, the commit succeeded."""
    bucket = open_run(s3, "run")
    rule = faulty_s3.cut("PUT", "commits/", times=1)
    (manifest,) = save(bucket, claim(bucket, {}), tmp_path, 100)
    assert rule.hits == 1
    assert committed(bucket) == [manifest]


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    """An empty folder is refused, because a manifest without files would always verify."""
    bucket = MemoryBucket()
    (tmp_path / "checkpoint-1" / "nested").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no files"):
        commit(bucket, claim(bucket, {}), tmp_path, Staged(folder="checkpoint-1", step=1), "digest")
    assert committed(bucket) == []


def test_an_attempt_that_loses_its_run_while_it_uploads_commits_nothing(
    bucket: Bucket, tmp_path: Path
) -> None:
    """The attempt checks that it owns the run after the upload too."""
    attempt = claim(bucket, {})
    taken_over: list[Attempt] = []
    with pytest.raises(Superseded):
        commit(
            bucket,
            attempt,
            tmp_path,
            stage(tmp_path, 10),
            "digest",
            ready=lambda: taken_over.append(claim(bucket, {})),
        )
    assert committed(bucket) == []

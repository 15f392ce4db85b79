"""A manifest describes a checkpoint, and is valid only if all its files exist."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.servers.stores import MemoryBucket
from trainer.bucket.layout import FINAL_COMMIT_KEY, commit_key, step_prefix
from trainer.bucket.manifest import (
    File,
    Manifest,
    Unreadable,
    commits,
    committed,
    final,
)


def manifest(
    step: int = 100, kind: Literal["checkpoint", "final"] = "checkpoint", **changes: Any
) -> Manifest:
    files = (
        File(path="model.safetensors", size=3, xxh3="aa"),
        File(path="optim/rank_0.bin", size=2, xxh3="bb"),
        File(path="trainer_state.json", size=1, xxh3="cc"),
    )
    values: dict[str, Any] = {
        "run_id": "tried",
        "attempt": 2,
        "step": step,
        "kind": kind,
        "created": datetime(2026, 11, 22, tzinfo=UTC),
        "recipe": "digest",
        "details": {"world_size": 1},
        "files": files,
    }
    return Manifest(**{**values, **changes})


def write(bucket: MemoryBucket, *manifests: Manifest) -> None:
    for each in manifests:
        bucket.put(each.key, each.model_dump_json().encode())
        for file in each.files:
            bucket.put(each.prefix + file.path, b"x" * file.size)


def test_keys_sort_as_steps_do() -> None:
    """Sorting the keys sorts the steps."""
    assert step_prefix(100) == "checkpoints/step-00000100/"
    assert commit_key(100) == "commits/step-00000100.json"
    assert manifest(100).prefix == "checkpoints/step-00000100/0002/"
    assert (manifest(kind="final").key, manifest(kind="final").prefix) == (FINAL_COMMIT_KEY, "final/")
    assert commit_key(99) < commit_key(100) < commit_key(99999)


def test_a_manifest_survives_the_way_through_a_bucket() -> None:
    """Manifests are read as they were written, newest first."""
    bucket = MemoryBucket()
    write(bucket, manifest(50), manifest(150), manifest(100))
    assert committed(bucket) == [manifest(150), manifest(100), manifest(50)]
    assert committed(bucket)[0].size == 6


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EOF"),
        (manifest().model_dump_json().encode()[:100], "EOF"),
        (b"\xff\xfe\x00", "Invalid JSON"),
        (b"{}", "run_id: Field required"),
        (b"[]", "is not a manifest"),
        (manifest(99).model_dump_json().encode(), "holds the manifest of checkpoint step 99"),
        (manifest(kind="final").model_dump_json().encode(), "holds the manifest of final step 100"),
    ],
)
def test_what_is_no_manifest_is_told_apart(data: bytes, reason: str) -> None:
    """A truncated or foreign manifest is reported with its reason, and hides no other manifest."""
    bucket = MemoryBucket()
    write(bucket, manifest(50))
    bucket.put(commit_key(100), data)
    broken, whole = commits(bucket)
    assert isinstance(broken, Unreadable)
    assert broken.step == 100
    assert reason in broken.reason
    assert commit_key(100) in broken.reason
    assert whole == manifest(50)
    assert committed(bucket) == [manifest(50)]


@given(st.binary(max_size=60))
def test_no_bytes_at_all_make_reading_crash(data: bytes) -> None:
    """Any bytes at a manifest's key give a result and no exception."""
    bucket = MemoryBucket()
    bucket.put(commit_key(1), data)
    assert committed(bucket) == []


@pytest.mark.parametrize("path", ["", ".", "../x", "a/../../x", "/etc/passwd", "a\\..\\x"])
def test_no_manifest_names_a_file_outside_its_folder(path: str) -> None:
    """A manipulated manifest cannot write outside the folder of a checkpoint."""
    with pytest.raises(ValidationError):
        File(path=path, size=0, xxh3="")


def test_a_fault_names_the_file_and_both_sizes() -> None:
    """The reason names the file, the expected size and the actual size."""
    there = {manifest().prefix + file.path: file.size for file in manifest().files}
    key = "checkpoints/step-00000100/0002/optim/rank_0.bin"
    assert manifest().fault(there) is None
    assert manifest().fault(there | {key: 1}) == f"{key} has 1 bytes, expected 2"
    del there[key]
    assert manifest().fault(there) == f"{key} is missing, expected 2 bytes"
    assert manifest(files=()).fault({}) == "commits/step-00000100.json names no files"


def test_the_weights_digest_is_of_the_weights_alone() -> None:
    """Two runs have equal weights if and only if the digests are equal."""
    model, optimizer, state = manifest().files
    digest = manifest().weights_digest
    other_state = File(path="training_args.bin", size=9, xxh3="dd")
    assert manifest(files=(state, optimizer, model), attempt=7).weights_digest == digest
    assert manifest(files=(model, optimizer, other_state)).weights_digest == digest
    assert manifest(files=(model.model_copy(update={"xxh3": "ab"}), optimizer)).weights_digest != digest
    assert manifest(files=(model,)).weights_digest != digest


def test_a_final_model_is_believed_only_with_all_its_files() -> None:
    """A final model counts only if its manifest and all its files exist."""
    bucket = MemoryBucket()
    assert final(bucket) is None
    write(bucket, manifest(kind="final"))
    assert final(bucket) == manifest(kind="final")
    bucket.delete(["final/trainer_state.json"])
    assert final(bucket) is None
    bucket.put(FINAL_COMMIT_KEY, b"{")
    assert final(bucket) is None


def test_a_newer_version_may_say_more() -> None:
    """Unknown fields of newer releases do not make a checkpoint unreadable."""
    text = manifest().model_dump_json().replace("{", '{"new": 1, ', 1)
    assert Manifest.model_validate_json(text) == manifest()

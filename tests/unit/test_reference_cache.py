"""The runs of a folder share a cache of reference log-probabilities, in which each run has its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from tests.servers.stores import MemoryBucket
from tests.unit.test_uploader import Told
from trainer.bucket import Bucket, Checked, list_runs, open_run
from trainer.bucket.attempts import claim
from trainer.bucket.reference_cache import ReferenceCache, open_cache
from trainer.bucket.uploader import DRAIN_TRIES, Uploader
from trainer.errors import BucketError
from trainer.fit import fit
from trainer.hardware import Shape
from trainer.recipe import Recipe, load
from trainer.recipe.model import reference_key
from trainer.staged import Staged, mark_staged, pending
from trainer.supervisor.attempt import open_reference_cache

LAPTOP = Shape(accelerator=None, count=0, memory_gib=None, cores=1, host_memory_gib=8.0, node="test")


def staged(
    tmp_path: Path, pairs: int, values: bytes = b"values", fingerprint: str = "f"
) -> tuple[Path, Staged]:
    folder = tmp_path / f"reference-{pairs}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logps.safetensors").write_bytes(values)
    (folder / "reference.json").write_text("{}")
    details = {"fingerprint": fingerprint, "pairs": pairs}
    return folder, Staged(folder=folder.name, step=0, kind="reference", details=details)


def shelf(uri: str, run_id: str, attempt: int = 1) -> ReferenceCache:
    return open_cache(uri, "recipe", run_id=run_id, attempt=attempt)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def test_what_is_put_is_fetched(uri: str, tmp_path: Path) -> None:
    """Another attempt can fetch an entry, and its checksums are verified."""
    shelf(uri, "run").put(*staged(tmp_path, 5))
    (folder,) = shelf(uri, "run", 2).fetch(tmp_path / "kept")
    assert (folder / "logps.safetensors").read_bytes() == b"values"
    assert folder.name == "0000-run"


def test_a_later_part_replaces_an_earlier(uri: str, tmp_path: Path) -> None:
    """The manifest names the newer files, and the older files are deleted."""
    shelf(uri, "run").put(*staged(tmp_path, 5, b"some"))
    shelf(uri, "run", 2).put(*staged(tmp_path, 9, b"all of them"))
    bucket = open_run(f"{uri}/reference", "recipe")
    assert [each.key for each in bucket.list()] == [
        "f/run.json",
        "f/run/0002-000000009/logps.safetensors",
        "f/run/0002-000000009/reference.json",
    ]
    (folder,) = shelf(uri, "run").fetch(tmp_path / "kept")
    assert (folder / "logps.safetensors").read_bytes() == b"all of them"


def test_runs_share_and_their_own_comes_first(uri: str, tmp_path: Path) -> None:
    """A run gets its own entry first, and then the largest ones of other runs."""
    shelf(uri, "small").put(*staged(tmp_path, 5, b"5"))
    shelf(uri, "large").put(*staged(tmp_path, 9, b"9"))
    assert [each.name for each in shelf(uri, "small").fetch(tmp_path / "a")] == ["0000-small", "0001-large"]
    assert [each.name for each in shelf(uri, "new").fetch(tmp_path / "b")] == ["0000-large", "0001-small"]


@pytest.mark.parametrize("data", [b"other!", b"cut", None])
def test_damage_is_not_handed_on(uri: str, tmp_path: Path, data: bytes | None) -> None:
    """Entries with a wrong checksum, a wrong size or a missing file are skipped."""
    shelf(uri, "bad").put(*staged(tmp_path, 9))
    shelf(uri, "good").put(*staged(tmp_path, 5))
    bucket, key = open_run(f"{uri}/reference", "recipe"), "f/bad/0001-000000009/logps.safetensors"
    bucket.delete([key])
    if data is not None:
        bucket.put(key, data)
    assert [each.name for each in shelf(uri, "bad").fetch(tmp_path / "kept")] == ["0001-good"]


@pytest.mark.parametrize("manifest", [b"", b"{}", b'{"run_id": "other"}'])
def test_what_is_no_manifest_is_passed_over(uri: str, tmp_path: Path, manifest: bytes) -> None:
    """An invalid manifest is ignored."""
    open_run(f"{uri}/reference", "recipe").put("f/run.json", manifest)
    assert shelf(uri, "run").fetch(tmp_path / "kept") == []


def test_files_without_a_manifest_are_nothing(uri: str, tmp_path: Path) -> None:
    """Files of an interrupted upload, which has no manifest, are ignored."""
    open_run(f"{uri}/reference", "recipe").put("f/run/0001-000000009/logps.safetensors", b"values")
    assert shelf(uri, "run").fetch(tmp_path / "kept") == []


def test_the_shelf_is_no_run(uri: str, tmp_path: Path) -> None:
    """The cache is not listed as a run, and no run can have its name."""
    shelf(uri, "run").put(*staged(tmp_path, 5))
    open_run(uri, "run").put("run.json", b"{}")
    assert list_runs(uri) == ["run"]
    with pytest.raises(BucketError, match="the folder that runs share"):
        open_run(uri, "reference")


def dpo(*overrides: str) -> Recipe:
    return load("zephyr-tiny/dpo", overrides).recipe


@pytest.mark.parametrize(
    "change",
    ["beta=0.5", "learning_rate=1e-6", "loss_type=ipo", "global_batch_size=64", "max_steps=7", "bf16=true"],
)
def test_runs_that_differ_in_training_share(change: str) -> None:
    """Recipes share a cache entry if they differ only in keys that do not change the reference."""
    assert reference_key(dpo(change)) == reference_key(dpo())


@pytest.mark.parametrize(
    "change",
    [
        "max_length=100",
        "max_prompt_length=50",
        "seed=7",
        "max_train_samples=9",
        "tiny={hidden_size: 64}",
        "ld_alpha=0.5",
    ],
)
def test_runs_that_differ_in_model_or_data_do_not(change: str) -> None:
    """Recipes with other models or data do not share a cache entry."""
    assert reference_key(dpo(change)) != reference_key(dpo())


def test_only_runs_that_compute_beforehand_have_a_shelf(uri: str) -> None:
    """SFT, LoRA and a reference model in memory have no cache."""

    def has_one(recipe: Recipe) -> bool:
        return (
            open_reference_cache(recipe, fit(recipe, LAPTOP, None), uri, run_id="run", attempt=1) is not None
        )

    assert has_one(dpo())
    assert not has_one(dpo("precompute_ref_log_probs=false"))
    assert not has_one(dpo("use_peft=true"))
    assert has_one(dpo("use_peft=true", "precompute_ref_log_probs=true"))
    assert not has_one(load("zephyr-tiny/sft").recipe)


class Refuses(MemoryBucket):
    """A bucket that refuses all writes."""

    def upload(self, key: str, path: Path) -> Checked:
        raise BucketError("no permission")


@pytest.mark.parametrize("kind", [MemoryBucket, Refuses])
def test_the_uploader_shelves_the_newest_and_checkpoints_do_not_wait_for_ever(
    tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """If the cache cannot be written, the uploader logs a warning and continues: a later attempt can recompute it."""
    bucket: Bucket = MemoryBucket()
    keeps: Bucket = kind(MemoryStore())
    staging, told = tmp_path / "staging", Told()
    for pairs in (7, 3):
        mark_staged(staging, staged(staging, pairs)[1])
    (staging / "checkpoint-4").mkdir()
    (staging / "checkpoint-4" / "weights").write_bytes(b"w")
    mark_staged(staging, Staged(folder="checkpoint-4", step=4))
    uploader = Uploader(
        bucket, claim(bucket, {}), staging, recipe_digest="r", keep=2, listener=told,
        reference_cache=ReferenceCache(keeps, "run", 1), poll_s=0.01, backoff=lambda _: 0.01,
    )  # fmt: skip
    uploader.start()
    told.wait_for("committed", 4)
    assert uploader.drain(30)
    uploader.stop()
    assert pending(staging) == []
    manifests = [json.loads(keeps.get(each.key)) for each in keeps.list() if each.key.endswith("run.json")]
    if kind is MemoryBucket:
        assert [manifest["pairs"] for manifest in manifests] == [7]
    else:
        assert manifests == []
        assert [event for event in told.events if event[0] == "failed"] == [("failed", 0)] * (DRAIN_TRIES - 1)
        assert "are not saved: no permission" in caplog.text

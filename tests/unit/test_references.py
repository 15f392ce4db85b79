"""`checkpoints prune --references`: cached reference log-probabilities that no run needs are shown, and deleted with --yes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.checkpoints.prune import delete_references, survey_references
from tests.unit.test_checkpoints import Type, keys, launcher, save  # noqa: F401 (a fixture)
from tests.unit.test_reference_cache import dpo, staged
from trainer.bucket import Bucket, attempts, open_run
from trainer.bucket.reference_cache import cached_recipes, open_cache
from trainer.recipe import Recipe, load
from trainer.recipe.model import reference_key
from trainer.run_record import write_or_compare

WEEK = timedelta(days=7)
OTHER = dpo("max_length=100")


class Folder:
    """A folder of runs, some of which have cached reference log-probabilities."""

    def __init__(self, uri: str, work: Path) -> None:
        self.uri = uri
        self.work = work

    def run(self, name: str, recipe: Recipe, *, done: bool = False) -> Bucket:
        bucket = open_run(self.uri, name)
        write_or_compare(bucket, name, recipe, ())
        if done:
            save(bucket, attempts.claim(bucket, {}), self.work / "staging", 4, "final")
        return bucket

    def keep(self, name: str, recipe: Recipe, *, days: float = 0.0) -> None:
        """Cache log-probabilities for the recipe's reference, with an age in days."""
        key = reference_key(recipe)
        shelved = open_cache(self.uri, key, run_id=name, attempt=1).put(*staged(self.work, 5))
        older = shelved.model_copy(update={"created": datetime.now(UTC) - timedelta(days=days)})
        self.shelf(recipe).put(older.key, older.model_dump_json().encode())

    def shelf(self, recipe: Recipe) -> Bucket:
        return open_run(f"{self.uri}/reference", reference_key(recipe))

    def kept(self) -> list[str]:
        """Return the runs whose reference manifests still exist."""
        left = [key for bucket in cached_recipes(self.uri).values() for key in keys(bucket)]
        return sorted(Path(key).stem for key in left if key.endswith(".json") and key.count("/") == 1)


@pytest.fixture
def folder(uri: str, tmp_path: Path) -> Folder:
    return Folder(uri, tmp_path / "work")


def test_references_are_shown_first_and_deleted_only_with_yes(folder: Folder, launcher: Type) -> None:  # noqa: F811
    """Old references of finished and deleted runs go; recent ones stay for the next run of a series."""
    folder.run("done", dpo(), done=True)
    folder.run("just-done", dpo(), done=True)
    folder.run("at-work", OTHER)
    for name, days in (("done", 8), ("gone", 30), ("just-done", 6)):
        folder.keep(name, dpo(), days=days)
    folder.keep("at-work", OTHER, days=300)
    before = {key: keys(bucket) for key, bucket in cached_recipes(folder.uri).items()}
    shown = launcher("prune", folder.uri, "--references")
    assert "would delete 2 references (of done, gone), 6 files" in shown.out
    assert "2 stay" in shown.out
    assert "add --yes" in shown.out
    assert {key: keys(bucket) for key, bucket in cached_recipes(folder.uri).items()} == before
    output = launcher("prune", folder.uri, "--references", "--yes", "--json").json
    assert [row["run"] for row in output["references"]] == ["done", "gone"]
    assert (output["files"], output["kept"], output["deleted"]) == (6, 2, True)
    assert {"fingerprint", "pairs", "created", "files", "bytes"} <= output["references"][0].keys()
    assert folder.kept() == ["at-work", "just-done"]
    assert not [key for key in keys(folder.shelf(dpo())) if "/done/" in key or "/gone/" in key]
    assert "nothing to delete; 2 stay" in launcher("prune", folder.uri, "--references", "--yes").out


def test_a_run_that_has_just_begun_may_use_another_s(tmp_path: Path, launcher: Type) -> None:  # noqa: F811
    """A new run with the same model and data protects another run's reference; one with others does not."""
    folder = Folder(str(tmp_path / "runs"), tmp_path / "work")
    folder.run("done", dpo(), done=True)
    folder.keep("done", dpo(), days=300)
    folder.keep("gone", OTHER, days=300)
    folder.run("begun", dpo("beta=0.5"))
    folder.run("lora", dpo("use_peft=true", "max_length=100"))
    folder.run("sft", load("zephyr-tiny/sft", ()).recipe)
    output = launcher("prune", folder.uri, "--references", "--yes", "--json").json
    assert [row["run"] for row in output["references"]] == ["gone"]
    assert folder.kept() == ["done"]


def test_older_than_takes_minutes_hours_or_days(tmp_path: Path, launcher: Type) -> None:  # noqa: F811
    """`--older-than` takes minutes, hours or days."""
    folder = Folder(str(tmp_path / "runs"), tmp_path / "work")
    for name, days in (("a-day", 1.1), ("a-month", 31)):
        folder.run(name, dpo(), done=True)
        folder.keep(name, dpo(), days=days)
    assert "(of a-month)" in launcher("prune", folder.uri, "--references", "--older-than", "30d").out
    assert "(of a-day, a-month)" in launcher("prune", folder.uri, "--references", "--older-than", "24h").out


@pytest.mark.parametrize("manifest", [None, b"nonsense"])
def test_files_without_a_manifest_go_unless_a_running_run_may_upload_them(
    tmp_path: Path,
    launcher: Type,  # noqa: F811
    manifest: bytes | None,
) -> None:
    """Files without a manifest are deleted for a finished run, and stay for a running one, which may be uploading them."""
    folder = Folder(str(tmp_path / "runs"), tmp_path / "work")
    folder.run("done", dpo(), done=True)
    folder.run("at-work", dpo())
    shelf = folder.shelf(dpo())
    for name in ("done", "at-work"):
        shelf.put(f"f/{name}/0001-000000009/logps.safetensors", b"values")
        if manifest is not None:
            shelf.put(f"f/{name}.json", manifest)
    output = launcher("prune", folder.uri, "--references", "--yes", "--json").json
    assert [(row["run"], row["created"]) for row in output["references"]] == [("done", None)]
    assert {key.split("/")[1].removesuffix(".json") for key in keys(shelf)} == {"at-work"}


def test_what_is_used_meanwhile_stays(tmp_path: Path) -> None:
    """A reference that a new run needs, or that was replaced, after the question is not deleted."""
    folder = Folder(str(tmp_path / "runs"), tmp_path / "work")
    for name, recipe in (("a", dpo()), ("b", OTHER)):
        folder.run(name, recipe, done=True)
        folder.keep(name, recipe, days=300)
    shown = survey_references(folder.uri, WEEK).unused
    assert [kept.entry.run_id for kept in sorted(shown, key=lambda kept: kept.entry.run_id)] == ["a", "b"]
    folder.run("begun", dpo())
    folder.keep("b", OTHER)
    delete_references(folder.uri, shown, WEEK)
    assert folder.kept() == ["a", "b"]


def test_a_run_that_cannot_be_read_keeps_all(tmp_path: Path, launcher: Type) -> None:  # noqa: F811
    """If an unfinished run's record is unreadable, nothing is deleted, because its needs are unknown."""
    folder = Folder(str(tmp_path / "runs"), tmp_path / "work")
    folder.keep("gone", dpo(), days=300)
    strange = folder.run("strange", dpo())
    strange.put("run.json", json.dumps({"recipe": {"of": "another version"}}).encode())
    answer = launcher("prune", folder.uri, "--references", "--yes")
    assert (answer.code, "run.json cannot be read" in answer.err) == (2, True)
    assert folder.kept() == ["gone"]
    save(strange, attempts.claim(strange, {}), tmp_path / "staging", 4, "final")
    assert launcher("prune", folder.uri, "--references", "--yes").code == 0
    assert folder.kept() == []


def test_contradictory_options_are_errors(tmp_path: Path, launcher: Type) -> None:  # noqa: F811
    """A run instead of a folder, contradictory or missing options, and an empty folder are errors."""
    folder = Folder(str(tmp_path / "runs"), tmp_path / "work")
    folder.run("done", dpo(), done=True)
    for words, message in {
        (f"{folder.uri}/done", "--references"): f"use {folder.uri}",
        (folder.uri, "--references", "--keep", "2"): "use `--keep N` for a run",
        (folder.uri,): "use `--keep N` for a run",
        (f"{folder.uri}/done", "--keep", "2", "--older-than", "2d"): "use `--keep N` for a run",
        (str(tmp_path / "nowhere"), "--references"): "no runs and no references",
    }.items():
        answer = launcher("prune", *words)
        assert (answer.code, message in answer.err) == (2, True), answer.err
    assert not (tmp_path / "nowhere").exists()

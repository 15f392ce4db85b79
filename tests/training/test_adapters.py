"""Adapters on the Hub, found in a cache as it leaves them; nothing here asks the Hub itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ModelError
from trainer.worker.model_source import from_hub


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def cached(cache: Path, name: str, *files: str) -> Path:
    """A snapshot as the Hub's client keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(folder.name)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_an_adapter_is_a_folder_to_merge(tmp_path: Path) -> None:
    """It has an `adapter_config.json`, whatever else lies there."""
    folder = cached(tmp_path, "org/adapter", "adapter_config.json", "config.json")
    assert from_hub("org/adapter", "main", cache=tmp_path) == folder


def test_a_whole_model_is_left_to_transformers(tmp_path: Path) -> None:
    """It is no adapter, and needs no Hub to know."""
    cached(tmp_path, "org/model", "config.json", "model.safetensors")
    assert from_hub("org/model", "main", cache=tmp_path) is None


def test_what_cannot_be_asked_for_is_not_taken_for_a_whole_model(tmp_path: Path) -> None:
    """An adapter loaded as a model would train another one, in silence."""
    with pytest.raises(ModelError, match="org/absent cannot be loaded"):
        from_hub("org/absent", "main", cache=tmp_path)

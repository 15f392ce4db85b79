"""Atomic writes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from trainer.files import write_atomically


def test_a_write_replaces_the_file(tmp_path: Path) -> None:
    """The new text is there, and no temporary file is left."""
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not cost the state that is there."""
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def full(self: Path, *args: object, **options: object) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_mix(tmp_path: Path) -> None:
    """Each writer has a temporary file of its own, so the result is the text of one of them."""
    path = tmp_path / "state.json"
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]

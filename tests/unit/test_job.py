"""The supervisor and its workers never read incomplete files of each other."""

from __future__ import annotations

from pathlib import Path

from trainer.job import Tail
from trainer.staged import Staged, mark_staged, pending


def test_a_folder_is_pending_only_once_it_is_marked(tmp_path: Path) -> None:
    """A checkpoint without a marker is still being written and is not pending."""
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    assert pending(tmp_path) == []
    mark_staged(tmp_path, Staged(folder="checkpoint-20", step=20))
    mark_staged(tmp_path, Staged(folder="checkpoint-10", step=10))
    assert [staged.step for staged in pending(tmp_path)] == [10, 20]


def test_the_final_model_comes_after_the_last_checkpoint(tmp_path: Path) -> None:
    """Both have the same step, and a recovery needs the checkpoint first."""
    mark_staged(tmp_path, Staged(folder="final", step=20, kind="final"))
    mark_staged(tmp_path, Staged(folder="checkpoint-20", step=20))
    assert [staged.kind for staged in pending(tmp_path)] == ["checkpoint", "final"]


def test_a_line_in_the_making_waits_for_its_end(tmp_path: Path) -> None:
    """A polling reader gets each line once and complete."""
    path = tmp_path / "steps.jsonl"
    tail = Tail(path)
    assert tail.new_lines() == []
    with path.open("a") as file:
        file.write('{"step": 1}\n{"st')
        file.flush()
        assert tail.new_lines() == ['{"step": 1}']
        file.write('ep": 2}\n')
    assert tail.new_lines() == ['{"step": 2}']
    assert tail.new_lines() == []

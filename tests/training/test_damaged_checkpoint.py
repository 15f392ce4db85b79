"""A checkpoint with a missing or damaged file is refused, and lost random numbers would show."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training import rank_files
from tests.training.jobs import LORA, SMALL, Trained, make_job, train
from tests.training.test_training import SFT, Small


@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
def test_random_numbers_that_are_lost_would_show(
    tmp_path: Path, small: Small, weights: tuple[str, ...]
) -> None:
    """An adapter is trained under dropout: with the random numbers of another step its losses differ. A whole model has none."""
    whole = small(SFT, *weights)
    [other] = rank_files.read(whole.checkpoint(4)).values()

    def change(name: str, _tensor: torch.Tensor) -> torch.Tensor | None:
        return other[name] if name.startswith("random/") else None

    saved = rank_files.copy_with(whole.checkpoint(2), tmp_path, change)
    again = train(make_job(tmp_path / "again", SFT, *SMALL, *weights, resume_from=saved))
    assert (again.trajectory == whole.trajectory[2:]) == (weights == ())


def resumed_from_damaged(
    tmp_path: Path, checkpoint: Path, name: str, damage: Callable[[Path], object]
) -> Trained:
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    damage(copy / name)
    return train(make_job(tmp_path / "resumed", SFT, *SMALL, resume_from=copy))


@pytest.mark.parametrize(
    "missing",
    ["rank-00000.safetensors", "index.json", "scalars.json", "trainer_state.json", "aeolus.json"],
)
def test_a_checkpoint_that_lacks_a_file_is_refused(tmp_path: Path, small: Small, missing: str) -> None:
    """Transformers would go on in silence, without an optimizer and with a new schedule."""
    again = resumed_from_damaged(tmp_path, small(SFT).checkpoint(2), missing, Path.unlink)
    assert again.outcome.status == "user_error"
    assert missing in again.outcome.message
    assert again.of("step") == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damaged", ["rank-00000.safetensors", "index.json", "scalars.json"])
def test_a_checkpoint_with_half_of_a_file_is_refused(tmp_path: Path, small: Small, damaged: str) -> None:
    """The message names the file and the way out, and nothing is trained."""
    again = resumed_from_damaged(tmp_path, small(SFT).checkpoint(2), damaged, cut)
    assert again.outcome.status == "user_error"
    assert f"the checkpoint's file checkpoint-2/{damaged} cannot be read" in again.outcome.message
    assert again.of("step") == []

"""Evaluations that fall on the end of an epoch or the start of a run, when the machine is lost around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.jobs import LORA
from tests.training.test_training import SFT, Small, resumed, signals, stopped

__all__ = ["signals"]

EPOCHS = ("eval_strategy=epoch", "max_steps=-1", "num_train_epochs=2", "save_steps=6", *LORA)
"""Six steps each, and dropout, which draws its numbers after an evaluation has drawn its own."""


def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(tmp_path: Path, small: Small) -> None:
    """Whoever goes on from there goes on exactly, and no epoch's evaluation is lost with the machine."""
    whole = small(SFT, *EPOCHS)
    assert [line["step"] for line in whole.of("eval")] == [6, 12]
    kinds = [line["kind"] for line in whole.lines if line["kind"] in ("eval", "saved")]
    assert kinds == ["eval", "saved"] * 2
    again = resumed(tmp_path, whole, 6, SFT, *EPOCHS)
    assert again.trajectory == whole.trajectory[6:]
    assert [line["step"] for line in again.of("eval")] == [12]


@pytest.mark.usefixtures("signals")
def test_a_stop_within_an_epoch_evaluates_nothing(tmp_path: Path) -> None:
    """Transformers takes it for the epoch's end: a machine that goes would compute the whole test set, and save again."""
    trained = stopped(tmp_path, 2, *EPOCHS)
    assert trained.outcome.status == "preempted"
    assert trained.of("eval") == []
    assert [line["step"] for line in trained.of("saved")] == [3]


def test_a_run_that_ends_within_an_epoch_is_evaluated(small: Small) -> None:
    """As Transformers does it: the last step ends the last epoch."""
    trained = small(SFT, "eval_strategy=epoch")
    assert [line["step"] for line in trained.of("eval")] == [4]


def test_the_evaluation_at_the_start_is_done_once(tmp_path: Path, small: Small) -> None:
    """Not at every recovery, where it would tell of a step that is no start."""
    whole = small(SFT, "eval_on_start=true", "eval_strategy=no")
    assert [line["step"] for line in whole.of("eval")] == [0]
    again = resumed(tmp_path, whole, 2, SFT, "eval_on_start=true", "eval_strategy=no")
    assert again.of("eval") == []
    assert again.trajectory == whole.trajectory[2:]

"""Evaluations at the end of an epoch, at the start of a run, and during a preemption notice are exact after a recovery."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import forks
from tests.training.jobs import LORA, Trained
from tests.training.noticed_rank import notice_within
from tests.training.ranks import finish, ranks_job, run
from tests.training.test_engines import ENGINES, needs_compiler
from tests.training.test_training import DPO, SFT, Small, resumed, signals, stopped
from trainer.job import Outcome

__all__ = ["signals"]

EPOCHS = ("eval_strategy=epoch", "max_steps=-1", "num_train_epochs=2", "save_steps=6", *LORA)
"""Six steps an epoch. Dropout draws random numbers after an evaluation has drawn its own."""
STEPS = ("eval_strategy=steps", "eval_steps=2", "per_device_eval_batch_size=1", "save_steps=4", *LORA)
"""Four batches in an evaluation."""


def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(tmp_path: Path, small: Small) -> None:
    """A resume from it is exact, and the result of the evaluation is not lost with the machine."""
    whole = small(SFT, *EPOCHS)
    assert [line["step"] for line in whole.of("eval")] == [6, 12]
    kinds = [line["kind"] for line in whole.lines if line["kind"] in ("eval", "saved")]
    assert kinds == ["eval", "saved"] * 2
    again = resumed(tmp_path, whole, 6, SFT, *EPOCHS)
    assert again.trajectory == whole.trajectory[6:]
    assert [line["step"] for line in again.of("eval")] == [12]


@pytest.mark.usefixtures("signals")
def test_a_stop_within_an_epoch_evaluates_nothing(tmp_path: Path) -> None:
    """Transformers treats a stop as the end of the epoch: it would evaluate the whole test set, and save again."""
    trained = stopped(tmp_path, 2, *EPOCHS)
    assert trained.outcome.status == "preempted"
    assert trained.of("eval") == []
    assert [line["step"] for line in trained.of("saved")] == [3]


def test_a_run_that_ends_within_an_epoch_is_evaluated(small: Small) -> None:
    """As in Transformers, the last step counts as the end of an epoch."""
    trained = small(SFT, "eval_strategy=epoch")
    assert [line["step"] for line in trained.of("eval")] == [4]


def test_the_evaluation_at_the_start_is_done_once(tmp_path: Path, small: Small) -> None:
    """It does not run again at a recovery, where it would evaluate a later step."""
    whole = small(SFT, "eval_on_start=true", "eval_strategy=no")
    assert [line["step"] for line in whole.of("eval")] == [0]
    again = resumed(tmp_path, whole, 2, SFT, "eval_on_start=true", "eval_strategy=no")
    assert again.of("eval") == []
    assert again.trajectory == whole.trajectory[2:]


def evaluations(trained: Trained) -> list[dict[str, object]]:
    return [{key: line[key] for key in line.keys() - {"seconds"}} for line in trained.of("eval")]


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("name", [SFT, DPO])
def test_a_notice_interrupts_an_evaluation(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its step is saved, the next attempt reruns the evaluation first, and the run ends like an undisturbed one."""
    words = (*STEPS, "disable_dropout=false") if name == DPO else STEPS
    whole = small(name, *words)
    with monkeypatch.context() as patch:
        batches = notice_within(patch)
        trained = stopped(tmp_path, 0, *words, name=name)
    assert batches == [1]
    assert trained.outcome.message == "at step 2, which is saved"
    assert evaluations(trained) == []
    assert [line["step"] for line in trained.of("saved")] == [2]
    again = resumed(tmp_path, trained, 2, name, *words)
    assert evaluations(again) == evaluations(whole)
    assert again.trajectory == whole.trajectory[2:]


@pytest.mark.usefixtures("signals")
def test_a_notice_interrupts_the_rerun_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is saved, because no step was trained."""
    with monkeypatch.context() as patch:
        notice_within(patch)
        trained = stopped(tmp_path, 0, *STEPS)
        again = resumed(tmp_path, trained, 2, SFT, *STEPS, listens=True)
    assert (again.outcome.status, again.outcome.message) == ("preempted", "at step 2, which is saved")
    assert [line["kind"] for line in again.lines if line["kind"] in ("step", "eval", "saved")] == []


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero3", marks=needs_compiler)])
def test_all_ranks_interrupt_an_evaluation_together(tmp_path: Path, kind: str) -> None:
    """Only one rank gets the signal. The rerun has the result of an undisturbed run."""
    words = (DPO, "eval_strategy=steps", "eval_steps=2", "per_device_eval_batch_size=1")
    whole = run(ranks_job(tmp_path / "whole", *words, **ENGINES[kind]))
    job = ranks_job(tmp_path / "noticed", *words, **ENGINES[kind])
    assert finish(forks.workers(job, "tests.training.noticed_rank")) == 0
    noticed = Trained(job, Outcome.model_validate_json(job.outcome.read_text()))
    assert noticed.outcome.message == "at step 2, which is saved"
    assert evaluations(noticed) == []
    saved = noticed.checkpoint(2)
    again = run(ranks_job(tmp_path / "again", *words, resume_from=saved, **ENGINES[kind]))
    assert evaluations(again) == evaluations(whole)
    assert again.trajectory == whole.trajectory[2:]

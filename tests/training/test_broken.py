"""A GPU that fails ends the attempt, not the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.jobs import SMALL, make_job, train
from trainer.worker.failures import broken

ECC = "CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    "message", [ECC, "CUDA error: unspecified launch failure", "CUDA error: unknown error"]
)
def test_a_failing_gpu_is_known_by_its_error(message: str) -> None:
    """However deep; the advice that CUDA adds is left out."""
    error = ValueError("while saving")
    error.__cause__ = torch.AcceleratorError(f"{message}\nSearch for `cudaErrorX` in the documentation")
    assert broken(error) == message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        OSError(ECC),
    ],
)
def test_a_fault_of_the_program_is_none_of_the_gpus(error: Exception) -> None:
    """It would fail on every machine alike."""
    assert broken(error) is None


def test_an_attempt_whose_gpu_fails_asks_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what CUDA says; as a bug the run would wait for a person."""

    def fails(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(ECC)

    monkeypatch.setattr("trainer.worker.model.load", fails)
    trained = train(make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL))
    assert trained.outcome.status == "unavailable"
    assert ECC in trained.outcome.message

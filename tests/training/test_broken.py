"""A failed GPU ends the attempt, and the run is recovered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.jobs import SMALL, make_job, train
from trainer.worker.failures import outcome_of

ECC = "CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    "message", [ECC, "CUDA error: unspecified launch failure", "CUDA error: unknown error"]
)
def test_a_failing_gpu_is_recognised_by_its_error(message: str, tmp_path: Path) -> None:
    """The error may be a cause of another one. The advice that CUDA adds is left out."""
    error = ValueError("while saving")
    error.__cause__ = torch.AcceleratorError(f"{message}\nSearch for `cudaErrorX` in the documentation")
    outcome = outcome_of(error, make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL))
    assert outcome is not None
    assert (outcome.status, outcome.message) == ("unavailable", f"a GPU failed: {message}")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        OSError(ECC),
    ],
)
def test_an_error_of_the_program_is_not_blamed_on_the_gpu(error: Exception, tmp_path: Path) -> None:
    """It would fail on every machine."""
    assert outcome_of(error, make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL)) is None


def test_an_attempt_whose_gpu_fails_asks_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message quotes CUDA. A bug would end the run instead of recovering it."""

    def fails(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(ECC)

    monkeypatch.setattr("trainer.worker.model.load", fails)
    trained = train(make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL))
    assert trained.outcome.status == "unavailable"
    assert ECC in trained.outcome.message

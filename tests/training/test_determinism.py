"""Nondeterministic kernels are not used, and an operation that has no other kernel is named in the error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.jobs import SMALL, make_job, train
from trainer.recipe import load
from trainer.worker.arguments import compute_deterministically
from trainer.worker.failures import outcome_of

SFT = "zephyr-tiny/sft"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=False)
    yield
    torch.use_deterministic_algorithms(before)


def test_every_kernel_adds_in_a_fixed_order() -> None:
    """PyTorch, cuBLAS and FlashAttention are set to deterministic kernels."""
    compute_deterministically(load(SFT, ()).recipe)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a warning leaves attention as it is"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"


def test_a_recipe_can_use_the_fastest_kernels() -> None:
    """`full_determinism: false` changes no setting."""
    compute_deterministically(load(SFT, ("full_determinism=false",)).recipe)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


def test_an_operation_without_a_deterministic_kernel_is_an_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_words: object) -> torch.Tensor:
        return torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))  # has none even on the CPU

    monkeypatch.setattr("transformers.Trainer.training_step", step)
    outcome = train(make_job(tmp_path / "work", SFT, *SMALL)).outcome
    assert outcome.status == "user_error"
    assert outcome.message.startswith("put_ does not have a deterministic implementation: the run could not")
    assert outcome.hint is not None
    assert "`full_determinism: false`" in outcome.hint


def test_any_other_error_stays_a_bug(tmp_path: Path) -> None:
    """It gets no outcome."""
    job = make_job(tmp_path / "work", SFT, *SMALL)
    assert outcome_of(RuntimeError("CUDA error: device-side assert triggered"), job) is None

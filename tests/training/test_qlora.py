"""A QLoRA run goes on on any shape: weights in NF4 with double quantisation, bfloat16 adapters, paged AdamW."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import rank_files
from tests.training.jobs import Trained, train
from tests.training.ranks import ranks_job, run, start, wait_for_step
from tests.training.test_engines import ENGINES, QLORA, SFT, steps_of, tokens_of
from tests.training.test_reshard import rest_of
from trainer.job import Job

pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")

SETTINGS = (*QLORA, "lora_dropout=0.0", "max_steps=20", "save_steps=5")
HALF = 10
SINGLE: dict[str, Any] = {"micro_batch": 8}
DDP = ENGINES["ddp"]
LOSS_TOLERANCE = 1e-3
"""Adapters in bfloat16, of other micro batches, after as many as 20 steps; losses are between 5.6 and 6.2."""
DRIFT_TOLERANCE = 2e-4
"""Bound of the mean difference: rounding errors cancel out, and lost state does not."""


def job_of(work: Path, shape: dict[str, Any], *, resume_from: Path | None = None) -> Job:
    return ranks_job(work, SFT, *SETTINGS, resume_from=resume_from, **shape)


def trained(work: Path, shape: dict[str, Any], *, resume_from: Path | None = None) -> Trained:
    """One process is this one."""
    job = job_of(work, shape, resume_from=resume_from)
    return train(job) if shape == SINGLE else run(job)


def differences(before: Trained, after: Trained) -> torch.Tensor:
    """Return the differences of the losses from the middle on."""
    losses = [steps_of(rest_of(before, HALF), "loss"), steps_of(after, "loss")]
    return torch.tensor(losses[0], dtype=torch.float64) - torch.tensor(losses[1], dtype=torch.float64)


def assert_goes_on(before: Trained, after: Trained) -> None:
    """10 steps there and 10 here are the 20 there: samples, rates, and losses as far as bfloat16 goes."""
    assert after.of("started")[0]["step"] == HALF, after.outcome
    rest = rest_of(before, HALF)
    assert steps_of(after, "samples") == steps_of(rest, "samples")
    assert tokens_of(after) == tokens_of(rest)
    assert steps_of(after, "learning_rate") == steps_of(rest, "learning_rate")
    difference = differences(before, after)
    assert difference.abs().max() <= LOSS_TOLERANCE
    assert difference.mean().abs() <= DRIFT_TOLERANCE


def assert_same_bits(before: Trained, again: Trained) -> None:
    assert again.of("started")[0]["step"] == HALF, again.outcome
    assert again.trajectory == before.trajectory[HALF:]
    mine, theirs = (load_file(each.final / "model.safetensors") for each in (again, before))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_killed_run_goes_on_exactly_and_under_ddp(tmp_path: Path) -> None:
    """SIGKILL on one process: another one ends with the undisturbed run's bits, and two processes with its losses."""
    whole = trained(tmp_path / "whole", SINGLE)
    killed = job_of(tmp_path / "killed", SINGLE)
    workers = start(killed)
    try:
        wait_for_step(killed, workers, HALF + 1)
    finally:
        workers.kill()
    assert workers.poll() == -signal.SIGKILL
    assert not killed.outcome.exists()
    saved = killed.staging / f"checkpoint-{HALF}"
    assert_same_bits(whole, trained(tmp_path / "again", SINGLE, resume_from=saved))
    assert_goes_on(whole, trained(tmp_path / "two", DDP, resume_from=saved))


def test_a_run_under_ddp_goes_on_exactly_and_on_one_process(tmp_path: Path) -> None:
    """Two processes again have the same bits; one has the same losses."""
    whole = trained(tmp_path / "whole", DDP)
    saved = whole.checkpoint(HALF)
    assert_same_bits(whole, trained(tmp_path / "again", DDP, resume_from=saved))
    assert_goes_on(whole, trained(tmp_path / "one", SINGLE, resume_from=saved))


def without(checkpoint: Path, into: Path, lost: str) -> Path:
    """Copy a checkpoint. In the copy a moment of the optimizer, or half of each adapter, is zero."""
    if lost != "adapter":
        return rank_files.copy_with_zeros(checkpoint, into, lost)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(tensor) if name.startswith("weights/") and "lora_B" in name else None

    return rank_files.copy_with(checkpoint, into, change)


def test_what_is_lost_would_show(tmp_path: Path) -> None:
    """The tolerance is no blindness: without a moment, or with a fresh adapter, the losses are others."""
    whole = trained(tmp_path / "whole", SINGLE)
    for lost in ("state1", "state2", "adapter"):
        saved = without(whole.checkpoint(HALF), tmp_path / lost, lost)
        after = trained(tmp_path / f"after-{lost}", SINGLE, resume_from=saved)
        assert differences(whole, after).abs().max() > 5 * LOSS_TOLERANCE, lost

"""What befalls the jobs of the laboratory: machines that are lost without a word or with a notice, and a pipeline."""

from __future__ import annotations

import os
from typing import Any

from tests.e2e.jobs import ARRIVES_S, FEW, LAST_STEP, SAVE_STEPS, SHORT, SMALLEST, Job
from tests.harness import ROOT, wait_until

SECOND = 2 * SAVE_STEPS
"""The step of the checkpoint that the second machine is lost while saving, and the third while uploading."""


def lose_three_machines(job: Job) -> dict[str, Any]:
    """In mid-step, in mid-save and in mid-upload; what `status` says of the job as the first one stands still."""
    job.submit("--detach", *SHORT)
    seen = lose_in_mid_step(job)
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    lose_in_mid_save(job)
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    lose_in_mid_upload(job)
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    assert job.wait_for("SUCCEEDED", "FAILED") == "SUCCEEDED"
    return seen


def lose_in_mid_step(job: Job) -> dict[str, Any]:
    """The first checkpoint is the newest commit; the worker is beyond it when the machine goes."""
    stand_beyond_the_first_commit(job)
    job.wait_for("RUNNING")
    seen = job.launcher.status(job.name)
    job.lose_machine()
    job.store.clear()
    assert job.view.committed_steps() == [SAVE_STEPS]
    return seen


def lose_in_mid_save(job: Job) -> None:
    """The optimizer's file of the second checkpoint is a pipe that nobody reads, so that save cannot end."""
    checkpoint = job.staging(attempt=2) / f"checkpoint-{SECOND}"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "optimizer.pt")
    wait_until(
        lambda: list(checkpoint.glob("*.safetensors")),
        "the weights of the second checkpoint to be saved",
        timeout_s=ARRIVES_S,
        poll_s=0.1,
    )
    job.lose_machine()
    assert not checkpoint.with_name(f"checkpoint-{SECOND}.staged").exists()
    assert job.view.committed_steps() == [SAVE_STEPS]


def lose_in_mid_upload(job: Job) -> None:
    """Part of the second checkpoint has arrived, its optimizer has not."""
    job.store.hold("PUT|POST", rf"checkpoints/step-0*{SECOND}/.*optimizer\.pt")
    assert job.store.wait_for_held(ARRIVES_S)
    job.lose_machine()
    job.store.clear()
    assert any(f"step-{SECOND:08d}" in item.key for item in job.view.bucket.list("checkpoints/"))
    assert job.view.committed_steps() == [SAVE_STEPS]


def take_machine_with_notice(job: Job) -> None:
    """What Slurm does for a job of higher priority: SIGTERM, a grace time, and SIGKILL."""
    job.submit("--detach", *SHORT)
    stand_beyond_the_first_commit(job)
    job.store.clear()
    job.lab.slurm.cancel(job.slurm_job())
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    assert job.wait_for("SUCCEEDED", "FAILED") == "SUCCEEDED"


def stand_beyond_the_first_commit(job: Job) -> None:
    """No later checkpoint can be committed until the store is cleared."""
    job.store.hold("PUT|POST", rf"commits/step-0*{SECOND}\.json")
    job.wait_for_step(SAVE_STEPS + 1)
    job.pause()
    assert job.step() < LAST_STEP
    wait_until(
        lambda: job.view.committed_steps() == [SAVE_STEPS],
        "the first checkpoint to be committed",
        timeout_s=ARRIVES_S,
        poll_s=0.3,
    )


def train_twice(job: Job) -> None:
    """The shipped pipeline, SFT and then DPO, each in small."""
    envs = {
        "SFT_RECIPE": "zephyr-tiny/sft",
        "SFT_OVERRIDES": " ".join((*FEW, *SMALLEST, *SHORT)),
        "DPO_RECIPE": "zephyr-tiny/dpo",
        "DPO_OVERRIDES": " ".join((*FEW, *SHORT)),
    }
    words = ("jobs", "launch", "--yes", "--detach-run", "--name", job.name, *job.given(envs))
    job.lab.sky.run(*words, ROOT / "jobs" / "zephyr.yaml")
    failed = ("FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER")
    assert job.wait_for("SUCCEEDED", "CANCELLED", *failed, timeout_s=2 * ARRIVES_S) == "SUCCEEDED"

"""Scenarios for the lab's jobs: a notice and three machines lost without one, a pipeline, a typo, two cancellations.

Each machine that a job loses costs a launch, which is a minute of CPU time: no job loses more than two.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from tests.e2e.jobs import ARRIVES_S, ENDLESS, FEW, LAST_STEP, SAVE_STEPS, SHORT, SMALLEST, Job
from tests.harness import ROOT, wait_until
from trainer.staged import TRAINER_STATE_FILE

FAILED = ("FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER")


class Disturbed(NamedTuple):
    """What was observed while a job lost machines."""

    restored: list[int]
    """The steps that its attempts begin from."""
    status: dict[str, Any] | None = None
    """The row of `status` while the first machine stood still."""


def lose_with_notice_and_in_mid_upload(job: Job) -> Disturbed:
    """Take the first machine with a notice, and the second without one while it uploads."""
    job.submit("--detach", *SHORT)
    status = take_machine_with_notice(job)
    stopped = max(job.view.committed_steps())
    assert SAVE_STEPS < stopped < LAST_STEP - SAVE_STEPS, "the notice came too late for the kill that follows"
    lose_in_mid_upload(job, stopped, (stopped // SAVE_STEPS + 1) * SAVE_STEPS)
    assert job.wait_for("SUCCEEDED", *FAILED) == "SUCCEEDED"
    return Disturbed([0, stopped, stopped], status)


def lose_in_mid_step_and_in_mid_save(job: Job) -> Disturbed:
    """Take the first machine between two commits, and the second while it saves, both without a notice."""
    job.submit("--detach", *SHORT)
    lose_in_mid_step(job, SAVE_STEPS, 2 * SAVE_STEPS)
    lose_in_mid_save(job, SAVE_STEPS, 2 * SAVE_STEPS)
    assert job.wait_for("SUCCEEDED", *FAILED) == "SUCCEEDED"
    return Disturbed([0, SAVE_STEPS, SAVE_STEPS])


def take_machine_with_notice(job: Job) -> dict[str, Any]:
    """Do what Slurm does for a job of higher priority: SIGTERM, a grace time, SIGKILL. Return the row of `status`."""
    job.store.hold("PUT|POST", rf"commits/step-(?!0*{SAVE_STEPS}\.)")
    stand_beyond(job, SAVE_STEPS)
    job.wait_for("RUNNING")
    status = job.launcher.status(job.name)
    job.store.clear()
    job.lab.slurm.cancel(job.slurm_job())
    assert job.wait_for("RECOVERING", *FAILED) == "RECOVERING"
    return status


def lose_in_mid_step(job: Job, stopped: int, following: int) -> None:
    """Kill the machine while the worker is beyond the newest commit."""
    job.store.hold("PUT|POST", rf"commits/step-0*{following}\.json")
    stand_beyond(job, stopped)
    job.lose_machine()
    job.store.clear()
    assert max(job.view.committed_steps()) == stopped
    assert job.wait_for("RECOVERING", *FAILED) == "RECOVERING"


def lose_in_mid_save(job: Job, stopped: int, following: int) -> None:
    """Kill the machine while it saves. The file of counters is a pipe without a reader, so the save cannot end."""
    checkpoint = job.staging(attempt=2) / f"checkpoint-{following}"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / TRAINER_STATE_FILE)
    wait_until(
        lambda: list(checkpoint.glob("*.safetensors")),
        f"the state of step {following} to be saved",
        timeout_s=ARRIVES_S,
        poll_s=0.1,
    )
    job.lose_machine()
    assert not checkpoint.with_name(f"checkpoint-{following}.staged").exists()
    assert max(job.view.committed_steps()) == stopped
    assert job.wait_for("RECOVERING", *FAILED) == "RECOVERING"


def lose_in_mid_upload(job: Job, stopped: int, following: int) -> None:
    """Kill the machine when a part of the checkpoint has arrived, but not the state of its rank."""
    job.store.hold("PUT|POST", rf"checkpoints/step-0*{following}/.*rank-0*\.safetensors")
    assert job.store.wait_for_held(ARRIVES_S)
    job.lose_machine()
    job.store.clear()
    assert any(f"step-{following:08d}" in item.key for item in job.view.bucket.list("checkpoints/"))
    assert max(job.view.committed_steps()) == stopped
    assert job.wait_for("RECOVERING", *FAILED) == "RECOVERING"


def stand_beyond(job: Job, commit: int) -> None:
    """Pause the first attempt after the step of the newest commit. The caller holds back the commits that follow."""
    job.stand_beyond(commit, attempt=1)
    assert job.step() < LAST_STEP
    wait_until(
        lambda: max(job.view.committed_steps(), default=0) == commit,
        f"step {commit} to be committed",
        timeout_s=ARRIVES_S,
        poll_s=0.3,
    )


def train_twice(job: Job) -> None:
    """Run the shipped pipeline, SFT and then DPO, each with a tiny model."""
    envs = {
        "SFT_RECIPE": "zephyr-tiny/sft",
        "SFT_OVERRIDES": " ".join((*FEW, *SMALLEST, *SHORT)),
        "DPO_RECIPE": "zephyr-tiny/dpo",
        "DPO_OVERRIDES": " ".join((*FEW, *SHORT)),
    }
    words = ("jobs", "launch", "--yes", "--detach-run", "--name", job.name, *job.given(envs))
    job.lab.sky.run(*words, ROOT / "jobs" / "zephyr.yaml")
    assert job.wait_for("SUCCEEDED", "CANCELLED", *FAILED, timeout_s=2 * ARRIVES_S) == "SUCCEEDED"


def mistype_a_key(job: Job) -> str:
    """Launch a job whose recipe has an unknown key. Return its final status."""
    job.launch(*SHORT, "learning_rat=1e-4")
    return job.wait_for("SUCCEEDED", "FAILED")


def cancel_managed(job: Job) -> str:
    """Cancel a managed job in mid-run. Return what the launcher printed."""
    return _cancel(job, managed=True)


def cancel_cluster(job: Job) -> str:
    """Cancel a job on a cluster of its own in mid-run. Return what the launcher printed."""
    return _cancel(job, managed=False)


def _cancel(job: Job, *, managed: bool) -> str:
    job.submit("--detach", *ENDLESS, managed=managed)
    job.stand_beyond(5, attempt=1)
    job.go_on_at_leisure()
    return job.launcher.run("cancel", job.name).stdout

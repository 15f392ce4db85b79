"""The shipped tasks on a real SkyPilot over a real Slurm: they end, they survive lost nodes, they fail and stop well."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Protocol

import pytest

from tests.e2e.jobs import ARRIVES_S, LAST_STEP, Job, reached
from tests.e2e.lab.lab import Lab
from tests.harness import wait_until
from tests.servers.s3 import FaultyS3


class MakesJobs(Protocol):
    def __call__(self, name: str) -> Job: ...


@pytest.fixture(scope="module")
def job(lab: Lab) -> Iterator[MakesJobs]:
    """Jobs of the laboratory, each with a store of its own before it that misbehaves on request."""
    with ExitStack() as stack:
        stack.enter_context(reached(lab))
        yield lambda name: Job(lab, name, stack.enter_context(FaultyS3(lab.secrets["AWS_ENDPOINT_URL"])))


@pytest.fixture(scope="module", autouse=True)
def background(job: MakesJobs, request: pytest.FixtureRequest) -> dict[str, Future[Job]]:
    """What takes longest, as far as tests ask for it, runs beside the other tests: SkyPilot mostly waits."""
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    longest = {"whole": undisturbed, "preempted": lose_three_machines}
    return {name: beside(work, job(name)) for name, work in longest.items() if name in asked}


@pytest.fixture(scope="module")
def whole(background: dict[str, Future[Job]]) -> Job:
    return background["whole"].result()


@pytest.fixture(scope="module")
def preempted(background: dict[str, Future[Job]]) -> Job:
    return background["preempted"].result()


def beside(work: Callable[[Job], Job], job: Job) -> Future[Job]:
    """Work in a thread that ends with the tests, so that a failed test need not wait for it."""
    future: Future[Job] = Future()

    def run() -> None:
        try:
            future.set_result(work(job))
        except BaseException as error:  # noqa: BLE001 (told by whoever asks for the result)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def undisturbed(job: Job) -> Job:
    job.launch()
    assert job.wait_for("SUCCEEDED", "FAILED", timeout_s=600) == "SUCCEEDED"
    return job


def lose_three_machines(job: Job) -> Job:
    """In mid-step, in mid-save and in mid-upload."""
    job.launch()
    lose_in_mid_step(job)
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    lose_in_mid_save(job)
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    lose_in_mid_upload(job)
    assert job.wait_for("RECOVERING", "FAILED") == "RECOVERING"
    assert job.wait_for("SUCCEEDED", "FAILED") == "SUCCEEDED"
    return job


def lose_in_mid_step(job: Job) -> None:
    """Step 4 is the newest commit; the worker is beyond it when the machine goes."""
    job.store.hold("PUT|POST", r"commits/step-0*8\.json")
    wait_until(
        lambda: job.view.committed_steps() == [4], "step 4 to be committed", timeout_s=ARRIVES_S, poll_s=0.3
    )
    wait_until(lambda: job.step() > 4, "step 5 to be told", timeout_s=ARRIVES_S, poll_s=0.1)
    job.lose_machine()
    job.store.clear()
    assert job.view.committed_steps() == [4]


def lose_in_mid_save(job: Job) -> None:
    """The optimizer's file of step 8 is a pipe that nobody reads, so that save cannot end."""
    checkpoint = job.staging(attempt=2) / "checkpoint-8"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "optimizer.pt")
    wait_until(
        lambda: list(checkpoint.glob("*.safetensors")), "the weights of step 8 to be saved", poll_s=0.1
    )
    job.lose_machine()
    assert not checkpoint.with_name("checkpoint-8.staged").exists()
    assert job.view.committed_steps() == [4]


def lose_in_mid_upload(job: Job) -> None:
    """Part of step 8 has arrived, its optimizer has not."""
    job.store.hold("PUT|POST", r"checkpoints/step-0*8/.*optimizer\.pt")
    assert job.store.wait_for_held(ARRIVES_S)
    job.lose_machine()
    job.store.clear()
    assert any("step-00000008" in item.key for item in job.view.bucket.list("checkpoints/"))
    assert job.view.committed_steps() == [4]


def test_a_plain_launch_brings_the_model_into_the_bucket(lab: Lab, job: MakesJobs) -> None:
    """`sky launch` of a shipped task, unmodified but for its bucket and its recipe, ends with `final/` committed."""
    plain = job("plain")
    said = lab.sky.run("launch", "--yes", "--cluster", "plain", *plain.words())
    lab.sky.run("down", "--yes", "plain")
    assert "done: the model is in" in said
    assert plain.view.final().step == LAST_STEP
    assert not [name for name in lab.slurm.jobs().values() if name.startswith("plain")]


def test_a_typo_in_the_recipe_fails_at_once(lab: Lab, job: MakesJobs) -> None:
    """No recovery is tried, and the logs have the message with the key that was meant."""
    typo = job("typo")
    typo.launch("learning_rat=1e-4")
    assert typo.wait_for("SUCCEEDED", "FAILED") == "FAILED"
    told = lab.sky.job("typo")
    assert told["recovery_count"] == 0
    assert "did you mean `learning_rate`" in lab.sky.run(
        "jobs", "logs", "--no-follow", str(told["job_id"]), check=False
    )


def test_a_cancelled_job_leaves_what_it_had_trained(lab: Lab, job: MakesJobs) -> None:
    """Cancelled in mid-run, the job saves, uploads and commits within the notice, and is gone."""
    cancelled = job("cancelled")
    cancelled.launch("max_steps=4000", "save_steps=2000")
    wait_until(lambda: cancelled.step() >= 5, "step 5 to be told", timeout_s=ARRIVES_S, poll_s=0.5)
    lab.sky.run("jobs", "cancel", "--yes", "--name", "cancelled")
    cancelled.wait_for("CANCELLED")
    [committed] = cancelled.view.committed_steps()
    assert committed == max(cancelled.view.steps())
    assert not [name for name in lab.slurm.jobs().values() if name.startswith("cancelled")]


def test_three_lost_machines_change_no_bit(whole: Job, preempted: Job, lab: Lab) -> None:
    """Every loss, every sample and the final weights are those of the undisturbed run."""
    assert lab.sky.job(preempted.name)["recovery_count"] == 3
    assert [event["step"] for event in preempted.view.events("restored")] == [0, 4, 4, 4]
    told = whole.view.steps()
    assert sorted(told) == list(range(1, LAST_STEP + 1))
    for step, tellings in preempted.view.steps().items():
        assert all(event in told[step] for event in tellings), f"step {step} diverged"
    assert sorted(preempted.view.steps()) == sorted(told)
    assert preempted.view.final().weights_digest == whole.view.final().weights_digest

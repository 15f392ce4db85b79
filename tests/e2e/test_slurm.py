"""Shipped tasks on a real SkyPilot over a real Slurm: they end, survive lost machines, fail and stop well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from tests.e2e import preemptions
from tests.e2e.jobs import LAST_STEP, SAVE_STEPS, SHORT, Job, reached
from tests.e2e.lab.lab import Lab
from tests.harness import RunView
from tests.servers.s3 import FaultyS3
from trainer.bucket import list_runs

SCENARIOS: dict[str, Callable[[Job], Any]] = {
    "disturbed": preemptions.lose_with_notice_and_in_mid_upload,
    "killed": preemptions.lose_in_mid_step_and_in_mid_save,
    "pipeline": preemptions.train_twice,
    "typo": preemptions.mistype_a_key,
    "cancelled_cluster": preemptions.cancel_cluster,
    "cancelled_managed": preemptions.cancel_managed,
}
"""What happens to a job. They run in the background in this order, because SkyPilot mostly waits."""
SAMPLE = {"disturbed", "cancelled_cluster"}
"""Both ways to lose a machine, and a cancellation. Of the others, what is ours is tested without SkyPilot as well:

`killed` tests/training/test_exact_resume.py; `cancelled_managed` and `pipeline` tests/unit/test_shipped_commands.py;
`typo` tests/unit/test_run_command.py and test_tasks.py.
"""
AT_ONCE = threading.Semaphore(2)
"""Scenarios at a time. With six clusters on this one node, their daemons were seen to restart without end."""


class MakesJobs(Protocol):
    def __call__(self, name: str) -> Job: ...


class Begun:
    """A scenario in a thread that ends with the tests, so that a failed test need not wait for it."""

    def __init__(self, work: Callable[[Job], Any], job: Job) -> None:
        self.job = job
        self._result: Future[Any] = Future()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def ended(self) -> Any:
        """Wait for the scenario. Return its result, or raise its error."""
        return self._result.result()

    def _run(self, work: Callable[[Job], Any]) -> None:
        with AT_ONCE:
            try:
                self._result.set_result(work(self.job))
            except BaseException as error:  # noqa: BLE001 (raised in the test that asks for the result)
                self._result.set_exception(error)


@pytest.fixture(scope="module")
def job(lab: Lab) -> Iterator[MakesJobs]:
    """Jobs of the laboratory, each with a store of its own before it that misbehaves on request."""
    lab.sky.pretend("Slurm")  # what other tests have it believe in would be tried for ever
    with ExitStack() as stack:
        stack.enter_context(reached(lab))
        yield lambda name: Job(lab, name, stack.enter_context(FaultyS3(lab.secrets["AWS_ENDPOINT_URL"])))


@pytest.fixture(scope="module", autouse=True)
def begun(job: MakesJobs, request: pytest.FixtureRequest) -> dict[str, Begun]:
    """The scenarios that the selected tests ask for, started in the background."""
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = {call.params.get("scenario") for call in calls}
    return {
        name: Begun(work, job(name.replace("_", "-"))) for name, work in SCENARIOS.items() if name in asked
    }


@pytest.fixture
def scenario(begun: dict[str, Begun], request: pytest.FixtureRequest) -> Begun:
    return begun[request.param]


def of(*names: str) -> pytest.MarkDecorator:
    """A test of these scenarios; `make test` runs the ones in `SAMPLE`."""
    thorough = [pytest.param(name, marks=[pytest.mark.thorough] * (name not in SAMPLE)) for name in names]
    return pytest.mark.parametrize("scenario", thorough, indirect=True)


@pytest.fixture(scope="module")
def whole(lab: Lab, job: MakesJobs) -> tuple[Job, str]:
    """An undisturbed run on a cluster launched by hand, and what SkyPilot printed."""
    plain = job("plain")
    return plain, lab.sky.run("launch", "--yes", "--cluster", "plain", *plain.words(*SHORT))


def test_a_plain_launch_brings_the_model_into_the_bucket(lab: Lab, whole: tuple[Job, str]) -> None:
    """`sky launch` of a shipped task, unmodified but for its bucket and its recipe, ends with `final/` committed."""
    plain, said = whole
    lab.sky.run("down", "--yes", "plain")
    assert "done: the model is in" in said
    assert plain.view.final().step == LAST_STEP
    assert sorted(plain.view.steps()) == list(range(1, LAST_STEP + 1))
    assert plain.gone()


@of("typo")
def test_a_typo_in_the_recipe_fails_at_once(lab: Lab, scenario: Begun) -> None:
    """No recovery is tried, and the log names the key that was meant."""
    assert scenario.ended() == "FAILED"
    job = lab.sky.job("typo")
    assert job["recovery_count"] == 0
    log = lab.sky.run("jobs", "logs", "--no-follow", str(job["job_id"]), check=False)
    assert "did you mean `learning_rate`" in log


@of("cancelled_managed", "cancelled_cluster")
def test_a_cancelled_job_leaves_what_it_had_trained(scenario: Begun) -> None:
    """A job that is cancelled in mid-run saves, uploads and commits within the grace time, and ends."""
    printed, cancelled = scenario.ended(), scenario.job
    [committed] = cancelled.view.committed_steps()
    assert committed == max(cancelled.view.steps())
    assert f"resumes from step {committed}" in printed
    assert "still there" not in printed
    assert cancelled.launcher.status(cancelled.name)["state"] in ("cancelled", "preempted")
    assert cancelled.gone()


@of("pipeline")
def test_the_second_task_of_a_pipeline_starts_from_the_first_s_model(
    whole: tuple[Job, str], scenario: Begun, lab: Lab
) -> None:
    """`sky jobs launch jobs/zephyr.yaml` trains SFT, then DPO of what came out of it."""
    scenario.ended()
    runs = [name for name in list_runs(lab.checkpoints) if "_pipeline_" in name]
    first, second = (next(name for name in runs if f"_{half}_" in name) for half in ("sft", "dpo"))
    sft, dpo = RunView(lab.checkpoints, first), RunView(lab.checkpoints, second)
    assert (sft.final().step, dpo.final().step) == (LAST_STEP, LAST_STEP)
    assert f"{lab.checkpoints}/{first}/final" in dpo.bucket.get("run.json").decode()
    [begin], [untrained] = dpo.steps()[1], whole[0].view.steps()[1]
    assert begin["loss"] < untrained["loss"], "the first step is of the weights as they were loaded"


@of("disturbed")
def test_a_notice_loses_no_step(scenario: Begun) -> None:
    """The run resumes at the step at which the notice stopped it."""
    stopped, view = scenario.ended().restored[1], scenario.job.view
    [message] = [event["message"] for event in view.events("preempted")]
    assert message == f"at step {stopped}, which is saved"
    steps = [(event["step"], event["attempt"]) for event in view.events("step")]
    assert [step for step, attempt in steps if attempt == 1] == list(range(1, stopped + 1))
    assert min(step for step, attempt in steps if attempt > 1) == stopped + 1


@of("disturbed", "killed")
def test_lost_machines_change_no_bit(whole: tuple[Job, str], scenario: Begun, lab: Lab) -> None:
    """Every loss, every sample and the final weights are those of the undisturbed run."""
    restored, lost = scenario.ended().restored, scenario.job
    assert lab.sky.job(lost.name)["recovery_count"] == len(restored) - 1
    assert [event["step"] for event in lost.view.events("restored")] == restored
    same_as(whole[0], lost)


@of("disturbed")
def test_status_and_logs_describe_it(scenario: Begun) -> None:
    """They describe it while it runs and when it is done, and what is done is not rented again."""
    (_, *restored), seen = scenario.ended()
    lost = scenario.job
    shown = {key: seen[key] for key in ("kind", "state", "committed", "attempts", "said")}
    assert shown == {
        "kind": "managed job",
        "state": "running",
        "committed": SAVE_STEPS,
        "attempts": 1,
        "said": "RUNNING",
    }
    assert SAVE_STEPS < seen["step"] < LAST_STEP
    row = lost.launcher.status(lost.name)
    assert (row["state"], row["step"], row["attempts"]) == ("done", LAST_STEP, 1 + len(restored))
    log = lost.launcher.run("logs", lost.name).stdout
    assert f"restored step {restored[-1]}" in log
    assert "done: the model is in" in log
    assert f"run {lost.name} is done since" in lost.submit(*SHORT)


def same_as(whole: Job, disturbed: Job) -> None:
    told, again = whole.view.steps(), disturbed.view.steps()
    assert sorted(again) == sorted(told)
    for step, tellings in again.items():
        assert all(event in told[step] for event in tellings), f"step {step} diverged"
    assert disturbed.view.final().weights_digest == whole.view.final().weights_digest

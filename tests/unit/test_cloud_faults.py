"""SkyPilot's exceptions and records are converted to ours, without SkyPilot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cloud.skypilot_errors import KNOWN, absent, plain, sort_fault
from launcher.cloud.skypilot_records import PHASES, LineStream, of_cluster, of_job
from trainer.errors import Unavailable


def fault(name: str, message: str = "its own words", base: type[Exception] = Exception) -> Exception:
    """Return an exception with the name of one of SkyPilot's classes."""
    return type(name, (base,), {})(message)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_fault_has_the_action_and_skypilots_text(name: str) -> None:
    """The message has the action, SkyPilot's text, and a hint if there is one."""
    told = sort_fault(fault(name), "launch a-run")
    assert told
    assert told.message.startswith("cannot launch a-run: ")
    assert told.message.endswith(": its own words")
    assert told.hint == KNOWN[name].hint
    assert isinstance(told, Unavailable) == KNOWN[name].passes


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ApiServerConnectionError", "sky api start"),
        ("NoCloudAccessError", "sky check"),
        ("InvalidCloudCredentials", "sky check"),
        ("ClusterNotUpError", "sky jobs queue --refresh"),
    ],
)
def test_the_hint_is_a_command(name: str, hint: str) -> None:
    """The hints for missing credentials, a stopped API server and a missing controller name a command."""
    assert hint in str(sort_fault(fault(name), "launch"))


def test_no_capacity_lists_what_was_tried() -> None:
    """The message lists each place once, with its answer."""
    error = fault("ResourcesUnavailableError", "\x1b[31mFailed to provision\x1b[0m")
    quota = fault("X", "Quota 'NVIDIA_A100_GPUS' exceeded in us-central1\nmore")
    error.failover_history = [quota, quota, fault("Y", "ZONE_RESOURCE_POOL_EXHAUSTED")]  # type: ignore[attr-defined]
    told = sort_fault(error, "launch a-run")
    assert isinstance(told, Unavailable)
    assert told.message.splitlines() == [
        "cannot launch a-run: no machine is available: Failed to provision",
        "  tried: Quota 'NVIDIA_A100_GPUS' exceeded in us-central1",
        "  tried: ZONE_RESOURCE_POOL_EXHAUSTED",
    ]
    assert "--retry-until-up" in str(told.hint)


def test_a_bug_stays_a_bug() -> None:
    """A bug keeps its traceback; an invalid request is a UserError."""
    assert sort_fault(KeyError("x"), "launch") is None
    assert sort_fault(TypeError("x"), "launch") is None
    assert "SkyPilot refused it: no such accelerator" in str(
        sort_fault(ValueError("no such accelerator"), "x")
    )


def test_a_child_of_a_known_fault_is_known() -> None:
    """Subclasses of SkyPilot's classes are recognised."""
    known = type("ResourcesUnavailableError", (Exception,), {})
    assert "no machine" in str(sort_fault(fault("KubeAPIUnreachableError", base=known), "launch"))
    assert absent(fault("ClusterDoesNotExist", base=ValueError))


def job(**given: Any) -> SimpleNamespace:
    some = {
        "job_id": 3,
        "task_id": 0,
        "job_name": "a-run",
        "status": SimpleNamespace(value="RUNNING"),
        "submitted_at": 10.0,
        "recovery_count": 2,
        "failure_reason": None,
        "cloud": "GCP",
        "region": "us-east4",
    }
    return SimpleNamespace(**{**some, **given})


def test_a_managed_job_becomes_a_status() -> None:
    """The status has SkyPilot's word and our phase."""
    found = of_job(job())
    assert found.model_dump() == {
        "kind": "managed job",
        "name": "a-run",
        "job_id": 3,
        "phase": "running",
        "raw_status": "RUNNING",
        "exit_code": None,
        "log_path": None,
        "where": "gcp/us-east4",
        "cloud": "gcp",
        "recoveries": 2,
        "reason": None,
        "since": 10.0,
    }
    assert of_job(job(cloud="-", region=None, status=None)).where is None


@pytest.mark.parametrize(
    "status", ["FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "SOMETHING_NEW"]
)
def test_what_is_not_known_to_go_well_failed(status: str) -> None:
    """Every other status of SkyPilot is a failure."""
    assert of_job(job(status=SimpleNamespace(value=status))).phase == "failed"


@pytest.mark.parametrize(
    ("status", "on_it", "phase"),
    [
        ("INIT", None, "waiting"),
        ("UP", None, "idle"),
        ("STOPPED", None, "idle"),
        ("UP", (1, "SETTING_UP"), "waiting"),
        ("UP", (1, "RUNNING"), "running"),
        ("UP", (1, "SUCCEEDED"), "done"),
        ("UP", (1, "FAILED"), "failed"),
        ("UP", (1, "CANCELLED"), "cancelled"),
    ],
)
def test_a_cluster_stands_as_its_last_job(status: str, on_it: tuple[int, str] | None, phase: str) -> None:
    """A cluster without a job is idle."""
    record = SimpleNamespace(
        name="a-run",
        status=SimpleNamespace(value=status),
        resources_str="1x(A100:8)",
        init_status_reason=None,
        launched_at=5,
        cloud="Slurm",
    )
    found = of_cluster(record, on_it)
    assert (found.kind, found.phase, found.where, found.cloud) == ("cluster", phase, "1x(A100:8)", "slurm")


def test_every_phase_is_one_of_ours() -> None:
    """Each value of the table is a phase."""
    assert set(PHASES.values()) <= {"waiting", "running", "recovering", "stopping", "done", "cancelled"}


def test_lines_come_whole_and_plain() -> None:
    """A redrawn spinner counts as its last state; an incomplete line waits."""
    heard: list[str] = []
    stream = LineStream(heard.append)
    stream.write("\x1b[32mUp")
    stream.write("\x1b[0m\nWaiting 1\rWaiting 2\r\nhalf")
    stream.flush()
    assert heard == ["Up", "Waiting 2"]


def test_colours_go() -> None:
    """Log files and pipes get no colours."""
    assert plain("\x1b[1;31mred\x1b[0m\x1b[?25l") == "red"

"""Parts of local runs that need no run: names, commands, exit codes, a growing log."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from launcher.cloud.local import ended_phase
from launcher.cloud.protocol import JobStatus
from launcher.local import process
from launcher.local.fault_injection import plan
from launcher.local.process import Home, LogTail, supervisor_command, supervisor_environment
from launcher.runs.run import RunHistory
from launcher.submit.outcome import judge


def test_the_same_run_in_two_buckets_is_two_runs(tmp_path: Path) -> None:
    """The local folder of a run depends on its bucket."""
    assert Home.of(tmp_path, "a-run", "/a").path != Home.of(tmp_path, "a-run", "/b").path


def test_the_supervisors_command_line() -> None:
    """Options come before the overrides, so that no override is parsed as an option."""
    command = supervisor_command("zephyr-tiny/dpo", ["beta=0.1"], checkpoints="gs://b/runs", run_id="a-run")
    assert command == (
        sys.executable, "-m", "trainer", "run", "--checkpoints", "gs://b/runs", "--run-id", "a-run",
        "--", "zephyr-tiny/dpo", "beta=0.1",
    )  # fmt: skip


def test_the_supervisor_finds_this_package_and_the_chosen_python() -> None:
    """Our package is first on the path, the caller's path stays, and the settings' Python is passed on."""
    environment = supervisor_environment(
        {"PYTHONPATH": "/theirs", "A": "b"}, trainer_python=Path("/opt/python")
    )
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(Path(process.__file__).parents[2]), "/theirs"]
    assert (environment["A"], environment["AEOLUS_TRAINER_PYTHON"]) == ("b", "/opt/python")
    assert "AEOLUS_TRAINER_PYTHON" not in supervisor_environment({})


@pytest.mark.parametrize(("after", "total_steps"), [(0, 100), (37, 60), (0, 6)])
def test_preemptions_are_planned_in_order_and_inside_the_training(after: int, total_steps: int) -> None:
    """They are at different steps, after the start and before the last step, and depend only on the seed."""
    for seed in range(50):
        spots = plan(after=after, total_steps=total_steps, times=5, seed=seed)
        steps = [spot.step for spot in spots]
        assert steps == sorted(set(steps))
        assert after < steps[0] <= steps[-1] < total_steps
        assert spots == plan(after=after, total_steps=total_steps, times=5, seed=seed)
    assert plan(after=0, total_steps=100, times=5, seed=1) != plan(after=0, total_steps=100, times=5, seed=2)
    assert len(plan(after=0, total_steps=100, times=5, seed=1)) == 5


@pytest.mark.parametrize(
    ("code", "cancelled", "how"),
    [
        (0, False, "done"),
        (75, False, "recover"),
        (75, True, "cancelled"),
        (-9, False, "recover"),
        (-15, True, "cancelled"),
        (77, False, "superseded"),
        (78, False, "refused"),
        (2, True, "refused"),
        (1, False, "failed"),
    ],
)
def test_what_an_exit_code_means(code: int, cancelled: bool, how: str) -> None:
    """Every exit code of the supervisor has one meaning."""
    phase = ended_phase(code, cancelled=cancelled)
    status = JobStatus(kind="local", name="a-run", job_id=1, phase=phase, raw_status="pid 1", exit_code=code)
    assert judge(status, RunHistory("a-run", "/runs/a-run", (), ())) == how


def test_a_log_is_followed_by_lines(tmp_path: Path) -> None:
    """An incomplete line waits for its end; a redrawn bar counts as its last state."""
    path = tmp_path / "log"
    log = LogTail(path)
    assert log.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert log.new_lines() == ["one"]
    path.write_bytes(b"one\ntwo\n10%\r50%\r100%\n")
    assert log.new_lines() == ["two", "100%"]
    assert LogTail(path, last_lines=2).new_lines() == ["two", "100%"]

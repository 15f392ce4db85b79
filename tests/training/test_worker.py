"""The worker as a process: signals before training, exit codes and outcomes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.training.jobs import SMALL, make_job
from trainer.worker.imports import uncollected

ROOT = Path(__file__).resolve().parents[2]
STARTING = """
import os, signal, sys
from pathlib import Path
from trainer.worker.supervisor_channel import Channel
from trainer.job import Job
channel = Channel(Job.model_validate_json(Path(sys.argv[1]).read_text()))
channel.listen()
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
print("went on")
"""


def starting(tmp_path: Path, signal_name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    job = make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL)
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    command = [sys.executable, "-c", STARTING, str(file), signal_name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False), job.outcome


def test_a_notice_before_training_ends_it_at_once(tmp_path: Path) -> None:
    """There is nothing to save, so the process ends as preempted while it still imports and loads."""
    ended, outcome = starting(tmp_path, "SIGTERM")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert json.loads(outcome.read_text())["status"] == "preempted"


def test_ctrl_c_is_handled_by_the_supervisor(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the workers too. They ignore it and wait for the supervisor's signal."""
    ended, outcome = starting(tmp_path, "SIGINT")
    assert ended.stdout == "went on\n"
    assert not outcome.exists()


def run_worker(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.worker", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_error_of_the_user_is_an_outcome(tmp_path: Path) -> None:
    """Wrong data give an outcome with message and hint, and no traceback."""
    job = make_job(tmp_path / "job", "zephyr-tiny/sft", "init=null", "model_name_or_path=org/model")
    job = job.model_copy(update={"model": "/absent"})
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    ended = run_worker(file)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    outcome = json.loads(job.outcome.read_text())
    assert outcome["status"] == "user_error"
    assert "/absent" in outcome["message"]


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    """An unexpected error writes no outcome, so the supervisor treats it as a crash."""
    job = make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL)
    (job.work / "model").write_text("a file where the model's folder is to be made")
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    ended = run_worker(file)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert not job.outcome.exists()


def test_the_garbage_collector_is_off_while_packages_are_imported() -> None:
    """It is on again afterwards, also after a failed import, and skips the imported objects."""
    try:
        with suppress(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()  # this process is not a worker

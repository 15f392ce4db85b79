"""If two supervisors are alive on one run, the superseded one changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness import ROOT, RunView, wait_until
from trainer.bucket import Bucket
from trainer.bucket.manifest import committed
from trainer.errors import ExitCode

Start = Callable[[str, str], psutil.Popen]
PATIENCE_S = 60


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a supervisor for the run at a URI, like a separate machine."""
    started: list[psutil.Popen] = []

    def begin(uri: str, fate: str) -> psutil.Popen:
        number = len(started) + 1
        command = [sys.executable, "-m", "tests.fakes.supervisor", uri, "r", str(tmp_path / f"work-{number}")]
        environ = {**os.environ, "FAKE_WORKER": fate, "AEOLUS_TRAINER_PYTHON": sys.executable}
        with (tmp_path / f"{number}.log").open("w") as log:
            process = psutil.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        for member in _tree(process):
            member.kill()
        process.wait()


def _tree(supervisor: psutil.Popen) -> list[psutil.Process]:
    if supervisor.poll() is not None:
        return []
    return [psutil.Process(supervisor.pid), *supervisor.children(recursive=True)]


def _bytes(bucket: Bucket) -> dict[str, bytes]:
    """Return all objects of the bucket except the events, since each attempt writes events of its own."""
    return {item.key: bucket.get(item.key) for item in bucket.list() if not item.key.startswith("events/")}


@pytest.mark.parametrize("frozen", ["machine", "supervisor"])
@pytest.mark.parametrize("store", ["folder", "s3", "gcs"])
def test_a_supervisor_that_wakes_after_its_run_was_taken_over_changes_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, start: Start, store: str, frozen: str
) -> None:
    """It neither commits its worker's save nor deletes anything, and ends with the exit code for superseded attempts."""
    uri = str(tmp_path / "bucket") if store == "folder" else str(request.getfixturevalue(store))
    view = RunView(uri, "r")
    older = start(uri, "waits@4")
    wait_until(lambda: view.committed_steps() == [2], "step 2 of the first", timeout_s=PATIENCE_S)
    wait_until(lambda: 4 in view.steps(), "step 4 of the first", timeout_s=PATIENCE_S)
    members = _tree(older)
    asleep = members if frozen == "machine" else members[:1]
    for process in asleep:
        process.suspend()
    wait_until(lambda: older.status() == psutil.STATUS_STOPPED, "the freeze", timeout_s=PATIENCE_S)

    newer = start(uri, "waits@5")
    wait_until(lambda: view.committed_steps() == [4, 2], "step 4 of the second", timeout_s=PATIENCE_S)
    wait_until(lambda: len(view.steps().get(4, [])) == 2, "step 5 of the second", timeout_s=PATIENCE_S)
    wait_until(lambda: not view.bucket.list("checkpoints/step-00000004/0001/"), "nothing of the first")
    before = _bytes(view.bucket)
    older.send_signal(signal.SIGTERM)  # taken when it wakes: its worker saves step 4 at once
    for process in reversed(asleep):  # the supervisor last: it may kill its worker at once
        process.resume()
    assert older.wait(PATIENCE_S) == ExitCode.SUPERSEDED
    assert _bytes(view.bucket) == before
    assert not any(process.is_running() for process in members)
    assert [event["attempt"] for event in view.events("superseded")] == [1]

    assert newer.poll() is None
    newer.send_signal(signal.SIGTERM)
    assert newer.wait(PATIENCE_S) == ExitCode.RECOVER
    assert [(manifest.step, manifest.attempt) for manifest in committed(view.bucket)] == [(5, 2), (4, 2)]

"""The preemption notice of Google's metadata server reaches a run in time to save and commit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.faults.test_supervisor import RECIPE
from tests.harness import ROOT, RunView, wait_until
from tests.servers.metadata import MetadataServer
from trainer.errors import ExitCode
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import HOST_VARIABLE, SOURCE, MetadataWatcher, Notice
from trainer.supervisor.run import run


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    monkeypatch.setenv("AEOLUS_TRAINER_PYTHON", sys.executable)
    return RunRequest(
        recipe=RECIPE,
        checkpoints=str(tmp_path / "runs"),
        run_id="r",
        program="tests.fakes.worker",
        work=tmp_path / "work",
    )


def test_a_preemption_during_a_run_is_saved_committed_and_recovered(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt resumes after the current step, and the window was reported before the notice."""
    view = RunView(request_.checkpoints, request_.run_id)
    notice = Notice()
    with MetadataServer() as server:
        MetadataWatcher(notice, environ={HOST_VARIABLE: server.host}).start()
        wait_until(server.waiting, "the watch", timeout_s=30)
        monkeypatch.setenv("FAKE_WORKER", "waits@3")

        def preempt() -> None:
            wait_until(lambda: 3 in view.steps(), "step 3")
            server.preempt()

        cloud = threading.Thread(target=preempt)
        cloud.start()
        assert run(request_, notice) == ExitCode.RECOVER
        cloud.join()
    assert view.committed_steps() == [3, 2]
    assert [event["source"] for event in view.events("notice")] == [SOURCE]
    window = view.events("window")[0]
    assert window["window_s"] == 30.0
    assert window["holds"] == "yes"
    monkeypatch.setenv("FAKE_WORKER", "")
    assert run(request_, Notice()) == ExitCode.DONE
    assert [event["step"] for event in view.events("step")] == [1, 2, 3, 4, 5, 6]
    second = [event for event in view.events("window") if event["attempt"] == 2]
    assert [event["window_s"] for event in second] == [None] * 2


def test_the_command_watches_the_metadata_server(tmp_path: Path) -> None:
    """`python -m trainer run` on a machine that is being preempted ends with the exit code that asks for a recovery."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.model_dump_json(exclude_defaults=True))
    with MetadataServer() as server:
        server.preempt()
        command = [sys.executable, "-m", "trainer", "run", str(recipe), "--run-id", "r"]
        command += ["--checkpoints", str(tmp_path / "runs"), "--work", str(tmp_path / "work")]
        environ = {**os.environ, HOST_VARIABLE: server.host, "AEOLUS_TRAINER_PYTHON": sys.executable}
        ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == ExitCode.RECOVER, ended.stdout + ended.stderr
    assert server.asked[0].key == "instance/preempted"

"""What a newcomer does first: submit, lose the machine, get the model, see the picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.supervisor.workers import worker_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a launcher command from a folder of the user's own; its exit code, stdout and stderr."""
    try:
        worker_python()
    except UserError as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home / "state")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.run(
            command,
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="module")
def sft(launcher: Any) -> dict[str, Any]:
    return submitted(launcher, "zephyr-tiny/sft", "--name", "sft", "--preempt", "1")


def submitted(launcher: Any, *words: str) -> dict[str, Any]:
    done = launcher("submit", *words, "--infra", "local", "--json")
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_sft_survives_a_lost_machine(sft: dict[str, Any]) -> None:
    """The run ends done with its model, and says what the lost machine cost."""
    assert sft["state"] == "done"
    assert sft["preempted_on_request"] == 1
    assert sft["attempts"] == 2
    assert Path(sft["report"]).read_bytes().startswith(b"\x89PNG")


def test_dpo_learns_from_it_which_answers_are_right(launcher: Any, sft: dict[str, Any]) -> None:
    """Reward accuracy on questions it never saw rises from about one half to over 0.9."""
    dpo = submitted(
        launcher,
        "zephyr-tiny/dpo",
        "--name",
        "dpo",
        "--preempt",
        "1",
        f"model_name_or_path={sft['final']}",
    )
    assert dpo["test_metric"] == "eval_rewards/accuracies"
    first, last = dpo["test"]
    assert 0.3 < first < 0.7
    assert last > 0.9
    assert dpo["preempted_on_request"] == 1


def test_the_same_command_again_does_nothing(launcher: Any, sft: dict[str, Any]) -> None:
    """A done run is recognised by its name and recipe."""
    again = submitted(launcher, "zephyr-tiny/sft", "--name", "sft")
    assert again["attempts"] == sft["attempts"]
    assert again["weights_digest"] == sft["weights_digest"]

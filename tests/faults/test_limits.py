"""A run that reaches its budget saves, commits and stops. A higher budget resumes it, with the same result as an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.runs.account import account
from launcher.runs.run import Reader
from tests.faults.test_supervisor import RECIPE
from tests.harness import ROOT, RunView, wait_until
from trainer.accounting import Limits, attempt_cost, boot_s
from trainer.errors import ExitCode
from trainer.options import BUDGET_USD, DEADLINE_H, PRICES, USD_PER_H
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import Notice
from trainer.supervisor.price import CLUSTER
from trainer.supervisor.run import run

TOTAL_STEPS = 12
A_DOLLAR_A_SECOND = "3600"
RECIPE_12 = RECIPE.model_copy(update={"trainer_args": {"max_steps": TOTAL_STEPS, "save_steps": 5, "seed": 7}})


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    monkeypatch.setenv("AEOLUS_TRAINER_PYTHON", sys.executable)
    monkeypatch.setenv(USD_PER_H, A_DOLLAR_A_SECOND)
    return RunRequest(
        recipe=RECIPE_12,
        checkpoints=str(tmp_path / "runs"),
        run_id="r",
        program="tests.fakes.counting",
        work=tmp_path / "work",
    )


def under(request: RunRequest, **limits: float) -> RunRequest:
    return request.model_copy(update={"limits": Limits(**limits)})


def losses(view: RunView) -> dict[int, Any]:
    """Return the loss of each step. A repeated step must have the same loss every time."""
    found = {step: {event["loss"] for event in events} for step, events in view.steps().items()}
    assert {len(values) for values in found.values()} == {1}
    return found


def waits(monkeypatch: pytest.MonkeyPatch, *, forever: bool) -> None:
    """Make each step of the program last until it is asked to stop, or take no time."""
    monkeypatch.setenv("COUNTING_STEP_S", "1000" if forever else "0")


def test_a_budget_of_two_attempts_stops_the_run_and_a_higher_one_ends_it_unchanged(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget covers all attempts together. The last state is committed, and the same budget starts nothing more."""
    view = RunView(request_.checkpoints, request_.run_id)
    waits(monkeypatch, forever=True)
    notice = Notice()

    def lose() -> None:
        wait_until(lambda: 1 in view.steps(), "step 1")
        notice.give("SIGTERM")

    cloud = threading.Thread(target=lose)
    cloud.start()
    assert run(under(request_, budget_usd=1000), notice) == ExitCode.RECOVER
    cloud.join()
    first = attempt_cost(view.events())
    budget = first.usd + 6
    assert run(under(request_, budget_usd=budget), Notice()) == ExitCode.LIMIT
    assert view.committed_steps() == [2, 1]
    (stopped,) = view.events("stopped")
    assert (stopped["what"], stopped["limit"]) == ("budget", budget)
    assert "stopped at step 2; run again with a higher budget to resume" in stopped["message"]
    second = attempt_cost([event for event in view.events() if event["attempt"] == 2])
    assert 0 < second.usd < budget
    assert [event["share"] for event in view.events("limit")] == [0.8, 1.0]
    assert not [event for event in view.events("notice") if event["attempt"] == 2]

    assert run(under(request_, budget_usd=budget), Notice()) == ExitCode.LIMIT
    third = [event["kind"] for event in view.events() if event["attempt"] == 3]
    assert third == ["claimed", "limit", "stopped"]
    assert Reader(view.bucket, "r").read().state == "stopped"

    waits(monkeypatch, forever=False)
    assert run(under(request_, budget_usd=100_000), Notice()) == ExitCode.DONE
    undisturbed = request_.model_copy(update={"run_id": "undisturbed"})
    assert run(undisturbed, Notice()) == ExitCode.DONE
    whole = RunView(request_.checkpoints, "undisturbed")
    assert losses(view) == losses(whole)
    assert len(losses(view)) == TOTAL_STEPS
    ends, end = view.final(), whole.final()
    assert ends
    assert end
    assert [(file.path, file.xxh3) for file in ends.files] == [(file.path, file.xxh3) for file in end.files]


def boots(monkeypatch: pytest.MonkeyPatch, *, ago_s: float) -> None:
    """This machine is one that SkyPilot rented, for a dollar a second, so long ago."""
    listed = {"infra": "lambda/here", "gpus": "None:0", "market": "on demand", "usd_per_h": 3600}
    monkeypatch.delenv(USD_PER_H)
    monkeypatch.setenv(CLUSTER, json.dumps({"cloud": "Lambda", "region": "here"}))
    monkeypatch.setenv(PRICES, json.dumps([listed]))
    booted = time.time() - ago_s
    monkeypatch.setattr(psutil, "boot_time", lambda: booted)


def test_a_budget_includes_the_boot(request_: RunRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt trains for less time than the budget alone would pay for. The next attempt on the machine pays for no boot."""
    view = RunView(request_.checkpoints, request_.run_id)
    boots(monkeypatch, ago_s=1000)
    waits(monkeypatch, forever=True)
    budget, a_minute = 1006.0, 1 / 60
    assert run(under(request_, budget_usd=budget, deadline_h=a_minute), Notice()) == ExitCode.LIMIT
    (stopped,) = view.events("stopped")
    assert stopped["what"] == "budget"
    paid_s = boot_s(view.events("claimed")[:1])
    assert paid_s > 1000
    assert stopped["usd"] == pytest.approx(
        stopped["hours"] * 3600 + paid_s, abs=1
    )  # the two are read one after the other
    assert stopped["hours"] * 3600 < budget <= stopped["usd"]

    assert run(under(request_, budget_usd=budget), Notice()) == ExitCode.LIMIT
    waits(monkeypatch, forever=False)
    assert run(under(request_, budget_usd=10_000), Notice()) == ExitCode.DONE
    assert ["booted" in claimed for claimed in view.events("claimed")] == [True, False, False]
    found = account(Reader(view.bucket, "r").read())
    assert found.hours.boot_s == pytest.approx(paid_s)
    assert found.usd == pytest.approx(found.hours.paid_s)


def test_a_boot_that_used_up_the_budget_starts_nothing(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the model is fetched."""
    view = RunView(request_.checkpoints, request_.run_id)
    boots(monkeypatch, ago_s=1000)
    assert run(under(request_, budget_usd=900), Notice()) == ExitCode.LIMIT
    assert [event["kind"] for event in view.events()] == ["claimed", "limit", "stopped"]


def test_limits_are_no_part_of_the_run_s_identity(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not in run.json. The limits of an attempt are in its own events."""
    waits(monkeypatch, forever=False)
    run(under(request_, budget_usd=50_000, deadline_h=24), Notice())
    view = RunView(request_.checkpoints, request_.run_id)
    assert b"budget" not in view.bucket.get("run.json")
    (claimed,) = view.events("claimed")
    assert claimed["limits"] == {"budget_usd": 50_000, "deadline_h": 24}
    assert claimed["price"]["usd_per_h"] == 3600
    assert claimed["plan"] is None


@pytest.mark.parametrize(
    ("options", "environ"),
    [(["--deadline", "0.0001m"], {}), ([], {DEADLINE_H: "0.000001"}), ([], {BUDGET_USD: "0.000001"})],
    ids=["option", "deadline of the environment", "budget of the environment"],
)
def test_the_command_ends_with_its_own_exit_code(
    options: list[str], environ: dict[str, str], tmp_path: Path
) -> None:
    """The exit code is 79, from which a managed job does not recover. No worker is started."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.model_dump_json(exclude_defaults=True))
    command = [sys.executable, "-m", "trainer", "run", str(recipe), "--run-id", "r", *options]
    command += ["--checkpoints", str(tmp_path / "runs"), "--work", str(tmp_path / "work")]
    here = {**os.environ, "AEOLUS_TRAINER_PYTHON": sys.executable, USD_PER_H: A_DOLLAR_A_SECOND, **environ}
    ended = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
    assert ended.returncode == 79, ended.stdout + ended.stderr
    assert "used up" in ended.stdout
    view = RunView(str(tmp_path / "runs"), "r")
    assert view.events("stopped")
    assert not view.events("started")

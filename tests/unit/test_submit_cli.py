"""The commands for runs on SkyPilot, as a user types them, with a stand-in for SkyPilot and a real S3 server."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from launcher.cloud.fake import FakeCloud
from launcher.cloud.protocol import JobStatus, Say
from launcher.settings import VARIABLES
from tests.fakes.runs import attempt_events
from trainer.bucket import open_run
from trainer.errors import Unavailable

RECIPE = "zephyr-tiny/dpo"
THERE = ("--infra", "slurm", "--gpus", "A100:8")
SECRET = "hf_0123456789"


class User:
    """Types commands; the bucket is `s3`."""

    def __init__(self, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.uri = uri
        self.cloud = FakeCloud()
        self._capsys = capsys
        self.code = 0
        self.out = self.err = ""

    def types(self, *words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(words, cloud=self.cloud)
        assert isinstance(ended.value.code, int)
        self.code = ended.value.code
        self.out, self.err = self._capsys.readouterr()
        return self.out

    def submits(self, *words: str) -> str:
        return self.types("submit", RECIPE, *THERE, "--checkpoints", self.uri, "--name", "a-run", *words)

    def trained(self, *, end: dict[str, Any] | None = None, price: dict[str, Any] | None = None) -> None:
        events = attempt_events(1, start=0, last=10, total_steps=20, end=end)
        events[0]["price"] = price
        bucket = open_run(self.uri, "a-run")
        bucket.put("events/0001.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())


@pytest.fixture
def user(
    s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> User:
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("AEOLUS_CONFIG", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    return User(s3, capsys)


def test_a_dry_run_prints_the_task_and_submits_nothing(user: User) -> None:
    """The task goes to stdout, the reasons to stderr, secrets to neither. A submission launches the same task."""
    text = user.submits("--managed", "--dryrun", "beta=0.2")
    assert user.code == 0
    assert not user.cloud.asked
    config = yaml.safe_load(text)
    assert config["envs"]["OVERRIDES"] == "beta=0.2"
    assert "A100:8 on slurm" in user.err
    assert "sky jobs launch TASK.yaml --secret HF_TOKEN" in user.err
    assert SECRET not in user.out + user.err
    user.submits("--managed", "--detach", "beta=0.2")
    assert user.cloud.launched == [("managed job", "a-run", config)]
    assert user.cloud.secrets["HF_TOKEN"] == SECRET


def test_a_dry_run_as_json_is_one_object(user: User) -> None:
    """It has the task, the command and the reasons."""
    told = json.loads(user.submits("--dryrun", "--json"))
    assert told["verb"] == "sky launch"
    assert told["task"]["name"] == "a-run"
    assert told["why"]


def test_a_detached_run_is_in_the_table_of_all(user: User) -> None:
    """The row has run, place, state, step, last commit, attempts and cost."""
    user.submits("--managed", "--detach", "--json")
    assert json.loads(user.out)["ending"] == "detached"
    user.trained()
    (row,) = json.loads(user.types("status", "--json"))
    assert (row["run"], row["kind"], row["state"], row["step"]) == ("a-run", "managed job", "running", 10)
    shown = user.types("status").splitlines()
    assert shown[0].split() == [
        "run",
        "where",
        "state",
        "step",
        "last",
        "commit",
        "attempts",
        "$",
        "so",
        "far",
    ]
    assert "managed job 1: GCP (us-central1)" in shown[1]


def test_the_closing_table_has_dollars_and_a_picture(user: User, tmp_path: Path) -> None:
    """The cost is that of the attempts' machines. The picture is in the state folder, not in the working directory."""
    user.cloud = FakeCloud(ends="failed")
    user.trained(price={"usd_per_h": 360.0})
    told = json.loads(user.submits("--managed", "--json"))
    assert told["usd"] == pytest.approx(told["wall_s"] * 0.1)
    assert told["usd"] > 0
    shown = user.submits("--managed")
    assert f"dollars                ${told['usd']:.2f}" in shown
    assert told["report"] in shown
    assert Path(told["report"]).is_relative_to(tmp_path / "XDG_STATE_HOME")
    assert Path(told["report"]).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.png"))


def test_submitting_twice_rents_once(user: User) -> None:
    """The second submission follows the running job."""
    user.submits("--managed", "--detach")
    user.submits("--managed", "--detach")
    assert len(user.cloud.launched) == 1
    assert "already running, as managed job 1 a-run" in user.err


def test_logs_are_skypilot_s(user: User) -> None:
    """The log comes from SkyPilot; without a job the error names the run's events."""
    user.submits("--detach")
    assert user.types("logs", "a-run") == "a line of the log\n"
    user.types("logs", "a-run", "-f")
    assert "logs a-run -f" in user.cloud.asked
    user.cloud.statuses.clear()
    user.types("logs", "a-run")
    assert user.code == 2
    assert f"{user.uri}/a-run/events" in user.err


def test_logs_go_to_stdout(user: User) -> None:
    """This holds while the adapter redirects SkyPilot's own output to stderr."""

    class Redirects(FakeCloud):
        def logs(self, status: JobStatus, say: Say, **options: Any) -> None:
            with contextlib.redirect_stdout(sys.stderr):
                super().logs(status, say, **options)

    user.cloud = Redirects()
    user.submits("--detach")
    assert user.types("logs", "a-run") == "a line of the log\n"


def test_cancel_and_down(user: User) -> None:
    """A cancelled job leaves its cluster up; `down` gives it back; repeating either is no error."""
    user.submits("--detach")
    user.trained(end={"kind": "preempted", "step": 10})
    assert "`launcher down a-run` gives it back" in user.types("cancel", "a-run")
    assert user.code == 0
    assert "resumes from step 10" in user.out
    assert "is not running: " in user.types("cancel", "a-run")
    assert "the cluster a-run is gone" in user.types("down", "a-run")
    assert user.cloud.clusters() == {}
    assert "is gone" in user.types("down", "a-run")
    assert user.cloud.asked.count("down a-run") == 1


def test_a_managed_job_goes_with_its_machine(user: User) -> None:
    """`down` cancels a managed job, whose controller gives the machine back."""
    user.submits("--managed", "--detach")
    user.types("down", "a-run")
    assert "cancel a-run" in user.cloud.asked
    assert not any(asked.startswith("down") for asked in user.cloud.asked)


def test_skypilot_s_faults_are_text(user: User) -> None:
    """The user reads what happened and a hint, with exit code 2. No record is written."""
    user.cloud.fault = Unavailable("SkyPilot's API server does not answer", hint="`sky api start`")
    user.submits("--managed")
    assert user.code == 2
    assert user.err.endswith("error: SkyPilot's API server does not answer\n  `sky api start`\n")
    assert "no run was started" in user.types("status")


def test_overrides_alone_are_of_the_default_task(user: User) -> None:
    """`submit beta=0.2` submits dpo_full."""
    words = ("submit", "beta=0.2", *THERE, "--checkpoints", user.uri, "--dryrun")
    config = yaml.safe_load(user.types(*words))
    assert config["envs"]["RECIPE"] == "zephyr-7b/dpo_full"
    assert config["envs"]["OVERRIDES"] == "beta=0.2"


def test_what_cannot_fit_is_exit_code_2(user: User) -> None:
    """Nothing is asked of SkyPilot."""
    user.types("submit", "--infra", "slurm", "--gpus", "T4:1", "--checkpoints", user.uri)
    assert user.code == 2
    assert "zephyr-7b/dpo_full" in user.err
    assert not user.cloud.asked


def test_several_nodes_are_one_job(user: User) -> None:
    """The task has their number, and each node gets its rank in torchrun's variable."""
    config = yaml.safe_load(user.submits("--managed", "--nodes", "2", "--dryrun"))
    assert config["num_nodes"] == 2
    assert "GROUP_RANK=$SKYPILOT_NODE_RANK" in config["run"]

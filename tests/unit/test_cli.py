"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.local import process
from launcher.local.process import Home, supervisor_environment
from launcher.runs.run import Reader
from launcher.settings import VARIABLES
from tests.fakes import trainer_program
from tests.fakes.runs import attempt_events, write_commit, write_events
from tests.harness import ROOT
from trainer.bucket import Bucket, open_run
from trainer.errors import BucketError, ExitCode
from trainer.recipe import default_run_id, load

RECIPE = "zephyr-tiny/dpo"
HEAVY = ("matplotlib", "numpy", "obstore", "psutil", "pydantic", "rich", "sky", "torch", "yaml")


@dataclass
class Answer:
    code: int
    out: str
    err: str


Type = Callable[..., Answer]


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user with empty folders, whose working directory is one of them."""
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("AEOLUS_CONFIG", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def launcher(capsys: pytest.CaptureFixture[str]) -> Type:
    def run(*words: str) -> Answer:
        with pytest.raises(SystemExit) as ended:
            main(words)
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Answer(int(ended.value.code), captured.out, captured.err)

    return run


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[Home]:
    """A run `a-run` whose supervisor waits at step 7."""
    runs = str(tmp_path / "runs")
    home = Home.of(tmp_path / "XDG_STATE_HOME" / "aeolus", "a-run", runs)
    words = ["run", "--checkpoints", runs, "--run-id", "a-run", "--", "fake", "stall=7"]
    process.start(
        home,
        [sys.executable, trainer_program.__file__, *words],
        supervisor_environment(os.environ),
        run_id="a-run",
        recipe="fake",
        checkpoints=runs,
    ).leave()
    reader = Reader(open_run(runs, "a-run"), "a-run")
    while reader.read().step < 7:
        pass
    yield home
    if left := process.attach(home):
        left.lose()


@pytest.fixture
def done_run(tmp_path: Path) -> Path:
    """The folder of a run of `RECIPE` that is done, once preempted."""
    folder = tmp_path / "runs" / default_run_id(load(RECIPE).recipe)
    end = {"kind": "exported", "step": 40, "bytes": 2048, "weights_digest": "abcd"}
    first = attempt_events(1, start=0, last=14, total_steps=40)
    write_events(folder, first, attempt_events(2, start=10, last=40, total_steps=40, end=end))
    write_commit(folder, "final", created="2026-01-01T00:05:00Z")
    return folder


def test_the_command_line_is_light() -> None:
    """Nothing heavy is imported before a command needs it, so help is fast."""
    code = "import sys, launcher.cli; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert not {name.partition(".")[0] for name in ran.stdout.split()} & set(HEAVY)


def test_before_the_set_up_it_says_how_to_set_up() -> None:
    """A Python without the packages gives a hint and no traceback."""
    ran = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launcher.__main__",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == ExitCode.USAGE
    assert ran.stderr.endswith(
        "has no `click`\n  `make setup` makes the environments; then `. .venv/bin/activate`\n"
    )
    assert "Traceback" not in ran.stderr


def test_help_has_each_command_on_one_line(launcher: Type) -> None:
    """No command's help is cut off on a terminal of 80 characters."""
    usage, _, commands = launcher("--help").out.partition("Commands:\n")
    assert usage
    assert commands
    assert "..." not in commands


def test_an_unknown_command_is_answered_with_the_nearest(launcher: Type) -> None:
    """The error suggests the nearest command."""
    answer = launcher("plann")
    assert answer.code == 2
    assert answer.err.endswith("No such command 'plann'. Did you mean 'plan'?\n")
    assert "mean" not in launcher("xyzzy").err


def test_a_done_run_is_reported_and_left(launcher: Type, done_run: Path) -> None:
    """The same submission of a done run prints when it was done, where the model is, and the report."""
    answer = launcher("submit", RECIPE, "--infra", "local")
    assert answer.code == 0
    assert f"is done since 2026-01-01T00:05:00Z: {done_run}/final" in answer.err
    assert "40 of 40, 4 redone" in answer.out
    assert (done_run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_object_on_stdout(launcher: Type, done_run: Path) -> None:
    """It has the facts of the report; all else goes to stderr."""
    answer = launcher("submit", RECIPE, "--infra", "local", "--json", "--checkpoints", str(done_run.parent))
    told = json.loads(answer.out)
    assert (told["run"], told["ending"], told["lost_steps"]) == (done_run.name, "done", 4)
    assert told["report"] == str(done_run / "report.png")


def test_an_override_makes_another_run(launcher: Type, done_run: Path) -> None:
    """The run's name follows the recipe's digest, so another recipe never continues this run."""
    changed = default_run_id(load(RECIPE, ["beta=0.7"]).recipe)
    assert changed != done_run.name
    assert changed.rpartition("-")[0] == done_run.name.rpartition("-")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "no/such", "--infra", "local"], "no/such"),
        (["submit", RECIPE, "--infra", "gpc"], "a folder of this machine, which gpc cannot reach"),
        (
            ["submit", RECIPE, "--infra", "local", "--gpus", "A100:8"],
            "--gpus cannot be used with --infra local",
        ),
        (["submit", RECIPE, "--infra", "local", "--infra", "gcp"], "this machine alone"),
        (["submit", RECIPE, "--infra", "slurm", "--preempt", "1"], "--preempt is for --infra local"),
        (["submit", RECIPE], "a folder of this machine, which gcp, lambda cannot reach"),
        (["submit", RECIPE, "--infra", "local", "--preempt", "2", "--detach"], "leave out --detach"),
        (["submit", RECIPE, "--infra", "local", "--preempt", "-1"], "--preempt"),
        (["submit", RECIPE, "--infra", "local", "--name", "a/b"], "cannot name a run"),
        (["submit", RECIPE, "--infra", "local", "bta=0.1"], "bta"),
        (["logs", "nobody"], "no run nobody was started on this machine"),
        (["cancel", "nobody"], "known runs: none yet"),
        (["down", "nobody"], "known runs: none yet"),
    ],
)
def test_a_user_error_is_exit_code_2(launcher: Type, words: list[str], said: str) -> None:
    """A wrong command or recipe is an error on stderr, without a traceback."""
    answer = launcher(*words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "Traceback" not in answer.err


def test_wrong_settings_are_exit_code_2(
    launcher: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown key of the settings is an error."""
    (tmp_path / "config.toml").write_text("bucket = 'gs://b'\n")
    monkeypatch.setenv("AEOLUS_CONFIG", str(tmp_path / "config.toml"))
    answer = launcher("submit", RECIPE, "--infra", "local")
    assert answer.code == 2
    assert "bucket: unknown key" in answer.err


def test_status_shows_running_runs(launcher: Type, at_work: Home) -> None:
    """The row has the process and the step of a detached run."""
    (row,) = json.loads(launcher("status", "--json").out)
    record = at_work.record()
    assert record
    assert (row["run"], row["state"], row["pid"], row["step"]) == ("a-run", "running", record.pid, 7)
    assert "a-run" in launcher("status").out


def test_status_shows_lost_supervisors(launcher: Type, at_work: Home) -> None:
    """A killed supervisor's run is `preempted`, whatever its last event was."""
    supervisor = process.attach(at_work)
    assert supervisor
    assert supervisor.lose()
    (row,) = json.loads(launcher("status", "--json").out)
    assert (row["state"], row["pid"]) == ("preempted", None)


def test_status_of_nothing(launcher: Type) -> None:
    """Without any run the table says so."""
    assert "no run was started" in launcher("status").out
    assert json.loads(launcher("status", "--json").out) == []


def test_cancel_waits_until_it_is_saved(launcher: Type, at_work: Home, tmp_path: Path) -> None:
    """When `cancel` returns, the run is committed and its supervisor has ended. A second call is no error."""
    answer = launcher("cancel", "a-run")
    assert answer.code == 0
    assert process.attach(at_work) is None
    assert (tmp_path / "runs" / "a-run" / "commits" / "step-00000007.json").exists()
    assert "is not running" in launcher("cancel", "a-run").out


def test_cancel_does_not_need_the_bucket(
    launcher: Type, at_work: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal without the bucket's credentials can cancel a local run."""

    def refuse(address: str, run_id: str) -> Bucket:
        raise BucketError(f"cannot open {address}/{run_id}: 403", hint="set AWS_PROFILE")

    monkeypatch.setattr("launcher.registry.find.open_run", refuse)
    answer = launcher("cancel", "a-run")
    assert answer.code == 0
    assert process.attach(at_work) is None
    assert "resumes from the newest commit" in answer.out


def test_logs_prints_the_supervisors_output(launcher: Type, at_work: Home) -> None:
    """It prints the whole log of a running run."""
    assert at_work.log.exists()
    assert launcher("logs", "a-run").out.splitlines()[:2] == ["step 1/20", "step 2/20"]


def test_runs_of_one_name_are_told_apart(launcher: Type, at_work: Home, tmp_path: Path) -> None:
    """A name of two runs is refused until the bucket is named."""
    record = at_work.record()
    assert record
    other = Home.of(tmp_path / "XDG_STATE_HOME" / "aeolus", "a-run", "/elsewhere")
    with other.locked():
        other.remember(record.model_copy(update={"checkpoints": "/elsewhere"}))
    answer = launcher("logs", "a-run")
    assert (answer.code, "choose one with --checkpoints" in answer.err) == (2, True)
    assert launcher("logs", "a-run", "--checkpoints", record.checkpoints).code == 0


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_an_option_that_the_shell_left_empty_is_refused(launcher: Type, command: str) -> None:
    """`--gpus "$GPUS"` with an unset variable must not mean the cheapest GPUs."""
    answer = launcher(command, "zephyr-7b/dpo_full", "--gpus", "")
    assert answer.code == ExitCode.USAGE
    assert "--gpus is empty" in answer.err


def test_a_folder_without_write_access_is_an_error(launcher: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some containers have a home folder without write access."""
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    answer = launcher("submit", RECIPE, "--infra", "local")
    assert answer.code == ExitCode.USAGE
    assert "error: cannot use /dev/null/state" in answer.err


def test_a_terminal_without_our_characters_gets_what_it_can_show(tmp_path: Path) -> None:
    """Bars and arrows are replaced under an ASCII locale."""
    write_events(tmp_path / "runs" / "a-run", attempt_events(1, start=0, last=9, total_steps=9))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher",
            "watch",
            "a-run",
            "--once",
            "--checkpoints",
            str(tmp_path / "runs"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"a-run" in done.stdout
    assert b"?" in done.stdout


def test_a_page_that_cannot_be_written_is_an_error(launcher: Type, tmp_path: Path) -> None:
    """`--html` below a file is an error."""
    write_events(tmp_path / "runs" / "a-run", attempt_events(1, start=0, last=9, total_steps=9))
    answer = launcher("report", "a-run", "--checkpoints", "runs", "--html", "/dev/null/page.html")
    assert answer.code == ExitCode.USAGE
    assert "cannot use /dev/null" in answer.err

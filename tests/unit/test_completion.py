"""Shell completion: of commands, options, recipes, tasks, runs and GPUs, through click and in real shells."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from launcher import completion
from launcher.cli import cli, main
from launcher.prices.load import DEFAULT_INFRA
from launcher.prices.store import SNAPSHOT
from launcher.submit import job_files
from tests.harness import ROOT
from trainer.hardware import gpu
from trainer.recipe import names

SHELL = {
    "bash": ["bash", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
"""Each is interactive, and reads no configuration file of the user."""
READS = {
    "bash": 'eval "$(launcher completion bash)"',
    "zsh": 'autoload -Uz compinit; compinit -u -D; eval "$(launcher completion zsh)"',
    "fish": "launcher completion fish | source",
}


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two runs in the state folder, and a file that is not a record."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "aeolus"
    (folder / "older-1234").mkdir(parents=True)
    (folder / "older-1234" / "supervisor.json").write_text(json.dumps({"run_id": "here"}))
    (folder / "submitted").mkdir()
    (folder / "submitted" / "a.json").write_text(json.dumps({"run_id": "there"}))
    (folder / "submitted" / "b.json").write_text("{")
    os.utime(folder / "older-1234" / "supervisor.json", (1, 1))
    return folder


def completed(*words: str) -> list[str]:
    *before, incomplete = words
    found = ShellComplete(cli, {}, "launcher", completion.VARIABLE).get_completions(before, incomplete)
    return [f"<{item.type}>" if item.type != "plain" else item.value for item in found]


def test_every_command_is_completed() -> None:
    """All commands of the command line are completed."""
    assert completed("") == sorted(cli.commands)
    assert completed("doc") == ["doctor"]
    assert "--checkpoints" in completed("submit", "--ch")


@pytest.mark.parametrize("command", ["plan", "doctor", "submit"])
def test_recipes_are_the_shipped_ones(command: str) -> None:
    """Recipes are completed by name, and other words as files."""
    assert set(names()) <= set(completed(command, ""))
    assert completed(command, "zephyr-tiny/") == ["zephyr-tiny/dpo", "zephyr-tiny/sft"]
    assert completed(command, "./my") == ["<file>"]


def test_submit_takes_tasks_too() -> None:
    """For `submit`, the tasks of jobs/ are completed too."""
    assert set(job_files.names()) <= set(completed("submit", ""))
    assert set(job_files.names()) & set(completed("plan", "")) == set()


@pytest.mark.parametrize(
    "before",
    [("logs",), ("cancel",), ("down",), ("submit", "--resume")],
    ids=" ".join,
)
def test_runs_are_those_of_this_machine(before: tuple[str, ...]) -> None:
    """Runs are completed, the latest first; unreadable records are skipped."""
    assert completed(*before, "") == ["there", "here"]
    assert completed(*before, "h") == ["here"]


def test_a_machine_without_runs_completes_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing state folder is no error."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))
    assert completed("logs", "") == []


def test_gpus_and_places_are_those_that_are_rented() -> None:
    """GPUs and clouds are completed; counts and regions after a colon or slash."""
    found = completed("plan", "--gpus", "")
    assert "A100-80GB" in found
    assert all(gpu(name).name for name in found)
    assert "A100:8" in completed("submit", "--gpus", "A100:")
    assert {*DEFAULT_INFRA, "local", "slurm"} <= set(completed("submit", "--infra", ""))
    assert "gcp/us-central1" in completed("plan", "--infra", "gcp/us-c")


def test_the_snapshot_is_the_one_that_prices_are_from() -> None:
    """The snapshot's path is defined twice, so that completion does not import the price module."""
    assert completion.SNAPSHOT == SNAPSHOT
    assert completion.JOBS == job_files.JOBS


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_is_click_s_own(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints click's script for each shell, for the program `launcher`."""
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert not ended.value.code
    output = capsys.readouterr().out
    assert f"_LAUNCHER_COMPLETE={shell}_complete" in output


def test_tab_imports_nothing_that_takes_long() -> None:
    """Completion runs at every Tab, so it imports no slow package."""
    script = (
        "import sys\nfrom launcher.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted(sys.modules))\n"
    )
    environ = {
        **os.environ, "COMP_WORDS": "launcher submit --gpus A1", "COMP_CWORD": "3", completion.VARIABLE: "bash_complete",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    output, _, loaded = done.stdout.rpartition("LOADED")
    assert "plain,A100" in output
    heavy = {"torch", "sky", "obstore", "pydantic", "yaml", "rich", "psutil", "numpy", "matplotlib"}
    assert not heavy & set(loaded.split())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_real_shell_completes(shell: str, state: Path, tmp_path: Path) -> None:
    """A real shell on a terminal reads the printed script and completes typed letters."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    mine = tmp_path / "with-a-name.yaml"
    mine.touch()
    output = typed(
        shell,
        [
            "launcher sub\t",
            "launcher submit --check\t",
            "launcher logs h\t",
            "launcher plan zephyr-tiny/d\t",
            "launcher plan --gpus A100-80GB:8\t",
            f"launcher plan {mine.parent}/with\t",
        ],
        tmp_path,
    )
    assert output == [
        ["submit"],
        ["submit", "--checkpoints"],
        ["logs", "here"],
        ["plan", "zephyr-tiny/dpo"],
        ["plan", "--gpus", "A100-80GB:8"],
        ["plan", str(mine)],
    ]


def typed(shell: str, lines: Sequence[str], folder: Path) -> list[list[str]]:
    """Return the arguments of each `launcher` command that a shell on a terminal ran after these lines were typed."""
    log = folder / "commands"
    program = folder / "bin" / "launcher"
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh
[ -n "${completion.VARIABLE}" ] || [ "$1" = completion ] && exec {sys.executable} -m launcher "$@"
printf '%s\\t' "$@" >> {log}; echo >> {log}
""")
    program.chmod(0o755)
    environ = {
        **os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder),
        "TERM": "xterm",
    }  # fmt: skip
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execvpe(SHELL[shell][0], SHELL[shell], environ)
    os.write(terminal, "".join(f"{line}\r" for line in (READS[shell], *lines, "exit")).encode())
    with contextlib.suppress(OSError):  # how Linux ends a terminal after its last process has ended
        while os.read(terminal, 4096):
            pass
    os.waitpid(child, 0)
    os.close(terminal)
    return [line.split("\t")[:-1] for line in log.read_text().splitlines()]

"""Shell completion with Tab: recipes, tasks, runs, GPUs and clouds; and the command that prints the shell's script.

The shell starts the launcher at every Tab, so this module imports nothing slow: it reads files without validating them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from launcher import terminal

JOBS = Path(__file__).resolve().parents[1] / "jobs"
SNAPSHOT = Path(__file__).with_name("prices") / "snapshot.json"
VARIABLE = "_LAUNCHER_COMPLETE"
OWN_MACHINES = ("kubernetes", "local", "slurm", "ssh")
"""Infrastructure that the user owns; it is not in the price snapshot."""
SHELLS = ("bash", "zsh", "fish")
LINES = {
    "bash": 'eval "$(launcher completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(launcher completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "launcher completion fish | source    # in ~/.config/fish/config.fish",
}
"""The line that enables completion in each shell."""


def recipes(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of shipped recipes, else files."""
    return _starting(_recipes(), incomplete) or _files(incomplete)


def recipes_and_tasks(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the arguments of `submit`: recipes and the tasks of jobs/, else files."""
    tasks = sorted(path.stem for path in JOBS.glob("*.yaml"))
    return _starting([*tasks, *_recipes()], incomplete) or _files(incomplete)


def runs(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the runs that were started or submitted from this machine, the latest first."""
    state = terminal.state_folder()
    found = [*state.glob("*/supervisor.json"), *state.glob("submitted/*.json")]
    names = (_run_id(path) for path in sorted(found, key=_modified, reverse=True))
    return _starting((name for name in names if name), incomplete)


def gpus(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete GPUs that can be rented: their names, and after a colon their counts."""
    rented = {(str(row["accelerator"]), int(row["gpus"])) for row in _price_rows()}
    if ":" in incomplete:
        return _starting((f"{name}:{count}" for name, count in sorted(rented)), incomplete)
    return _starting(sorted({name for name, _ in rented}), incomplete)


def infra(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete clouds of the price snapshot and the user's own infrastructure; after a slash, a cloud's regions."""
    places = {(str(row["infra"]), str(row["region"])) for row in _price_rows()}
    if "/" in incomplete:
        return _starting(sorted(f"{cloud}/{region}" for cloud, region in places), incomplete)
    return _starting(sorted({*OWN_MACHINES, *(cloud for cloud, _ in places)}), incomplete)


@click.command(
    short_help="Print the completion script for bash, zsh or fish.", epilog="\b\n" + "\n".join(LINES.values())
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes `launcher`: commands, options, recipes, runs and GPUs."""
    completion_class = get_completion_class(shell)
    assert completion_class is not None  # noqa: S101 (click has all three)
    root = context.find_root().command
    click.echo(completion_class(root, {}, "launcher", VARIABLE).source())


def _price_rows() -> list[dict[str, Any]]:
    """Return the rows of the price snapshot, in the format of `launcher.prices.store`."""
    table = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _recipes() -> list[str]:
    folder = JOBS / "recipes"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _files(incomplete: str) -> list[CompletionItem]:
    """Let the shell complete files; fish uses the item's value, the other shells use the typed word."""
    return [CompletionItem(incomplete, type="file")]


def _run_id(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):  # written by another version, or deleted since
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

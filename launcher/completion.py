"""What the shell completes with Tab: recipes, tasks, runs, GPUs, clouds; and the script that has it do so.

A shell asks anew at each Tab, so nothing here imports what takes long: files are looked at, and none is checked.
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
OWN = ("kubernetes", "local", "slurm", "ssh")
SHELLS = ("bash", "zsh", "fish")
LINES = {
    "bash": 'eval "$(launcher completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(launcher completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "launcher completion fish | source    # in ~/.config/fish/config.fish",
}


def recipes(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped recipes by name, else files."""
    return _starting(_recipes(), incomplete) or _files(incomplete)


def recipes_and_tasks(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What `submit` takes: recipes, and the tasks of jobs/, else files."""
    tasks = sorted(path.stem for path in JOBS.glob("*.yaml"))
    return _starting([*tasks, *_recipes()], incomplete) or _files(incomplete)


def runs(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What was started or submitted from this machine, the latest first."""
    state = terminal.state_folder()
    found = [*state.glob("*/supervisor.json"), *state.glob("submitted/*.json")]
    names = (_run_id(path) for path in sorted(found, key=_written, reverse=True))
    return _starting((name for name in names if name), incomplete)


def gpus(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What is rented, by name; behind a colon, in which numbers."""
    rented = {(str(row["accelerator"]), int(row["gpus"])) for row in _rows()}
    if ":" in incomplete:
        return _starting((f"{name}:{count}" for name, count in sorted(rented)), incomplete)
    return _starting(sorted({name for name, _ in rented}), incomplete)


def infra(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Clouds of the shipped prices, machines of one's own; behind a slash, a cloud's regions."""
    places = {(str(row["infra"]), str(row["region"])) for row in _rows()}
    if "/" in incomplete:
        return _starting(sorted(f"{cloud}/{region}" for cloud, region in places), incomplete)
    return _starting(sorted({*OWN, *(cloud for cloud, _ in places)}), incomplete)


@click.command(short_help="The script for Tab: bash, zsh, fish.", epilog="\b\n" + "\n".join(LINES.values()))
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that has SHELL complete `launcher` with Tab: commands, options, recipes, runs, GPUs."""
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 (click has all three)
    root = context.find_root().command
    click.echo(found(root, {}, "launcher", VARIABLE).source())


def _rows() -> list[dict[str, Any]]:
    """Of the shipped snapshot of prices, as `launcher.prices.store` writes it."""
    table = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _recipes() -> list[str]:
    folder = JOBS / "recipes"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _files(incomplete: str) -> list[CompletionItem]:
    """Left to the shell; fish completes what the item says, the others what was typed."""
    return [CompletionItem(incomplete, type="file")]


def _run_id(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):  # another version's, or gone since
        return None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

"""What the commands share: where this machine's state lies, and the two streams."""

from __future__ import annotations

from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

Answer = Literal["detach", "cancel", "continue"]
"""What the user chooses after Ctrl-C."""
WIDTH = 200
"""Characters of a line in a file: the widest table has 160."""


def state_folder() -> Path:
    """What this machine knows of the runs that were started or submitted here."""
    from platformdirs import user_state_path

    return user_state_path("aeolus")


def take_any_text(stream: IO[str]) -> None:
    """What the locale's encoding lacks becomes a question mark: a report has arrows and bars."""
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


def refuse_empty(options: Mapping[str, object]) -> None:
    """An option with no value is a shell's variable that is not set; it does not mean the default."""
    if empty := [name for name, value in options.items() if value == ""]:
        from click import UsageError

        raise UsageError(f"--{empty[0].replace('_', '-')} is empty: is a variable of your shell not set?")


def stdout(file: IO[str] | None = None) -> Console:
    """As wide as the terminal; a file or a pipe folds nothing.

    Args:
        file: None: what `sys.stdout` is now.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=WIDTH)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def ask() -> Answer:
    """What a Ctrl-C means."""
    answers: dict[str, Answer] = {"d": "detach", "c": "cancel"}
    try:
        typed = input(
            "\n[d]etach: training goes on by itself; [c]ancel: save and stop; anything else: continue > "
        )
    except EOFError:
        return "continue"
    return answers.get(typed.strip().lower()[:1], "continue")

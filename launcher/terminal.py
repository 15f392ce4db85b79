"""What the commands share: where this machine's state lies, and the two streams."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.local.follow import Answer


def state_folder() -> Path:
    """What this machine knows of the runs that were started or submitted here."""
    from platformdirs import user_state_path

    return user_state_path("aeolus")


def stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


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

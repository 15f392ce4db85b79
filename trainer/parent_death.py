"""A process that must not outlive its parent: `python -m trainer.parent_death COMMAND…`.

A supervisor killed with SIGKILL can tell nobody, and workers left behind would keep the GPU and
train a run that somebody else goes on with. Linux can kill a child when its parent dies; the wish
survives `exec`, so one small step in between leashes any program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PARENT_VARIABLE = "AEOLUS_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int, *, die: Callable[[], None] | None = None) -> None:
    """Have this process killed as soon as process `parent_pid` ends, even if it ended already."""
    die = die or (lambda: os.kill(os.getpid(), signal.SIGKILL))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent_pid, die), daemon=True).start()
    if os.getppid() != parent_pid:  # it died before we asked
        die()


def _watch(parent_pid: int, die: Callable[[], None]) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    die()


def leashed(command: list[str]) -> list[str]:
    """The command line that runs `command` on a leash held by this process."""
    return [command[0], "-m", "trainer.parent_death", str(os.getpid()), *command]


def main() -> None:
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    os.execv(command[0], command)  # noqa: S606 (no shell is the point)


if __name__ == "__main__":
    main()

"""Run a program that ends with its parent process: `python -m trainer.parent_death PARENT_PID COMMAND…`.

A supervisor that is killed with SIGKILL cannot stop its workers. Orphaned workers would keep the GPU, and train a run
that another attempt has resumed. Linux can kill a child process when its parent dies. This setting survives `exec`, so
this small program sets it and then replaces itself by the command.
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
    """Kill this process as soon as process `parent_pid` ends, even if it has ended already.

    Args:
        parent_pid: the parent of this process.
        die: replaces the kill in tests.
    """
    die = die or (lambda: os.kill(os.getpid(), signal.SIGKILL))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent_pid, die), daemon=True).start()
    if os.getppid() != parent_pid:  # it ended before the call above
        die()


def killed_with_parent(command: list[str]) -> list[str]:
    """Return the command line that runs `command` and ends it with this process."""
    return [command[0], "-m", "trainer.parent_death", str(os.getpid()), *command]


def main() -> None:
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    os.execv(command[0], command)  # noqa: S606 (the command must not run in a shell)


def _watch(parent_pid: int, die: Callable[[], None]) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    die()


if __name__ == "__main__":
    main()

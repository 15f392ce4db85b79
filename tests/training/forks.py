"""Ranks that import nothing: forks of a process that has imported the stack once (`tests.training.warm`).

For tests of what ranks compute. What kills ranks, sends them signals, watches them start, or puts something in their way
before they import, starts real ones.
"""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.training.forked import ADDRESS_VARIABLE, PROGRAM_VARIABLE
from trainer.job import Job
from trainer.parent_death import killed_with_parent
from trainer.supervisor.workers import PROGRAM, Workers, environment

OF_ONE = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTEST_CURRENT_TEST",
}
"""Variables of one rank or test, which no import reads; for each set of all others there is a warm process."""
Variables = frozenset[tuple[str, str]]
_warm: dict[Variables, tuple[subprocess.Popen[bytes], bytes]] = {}


def workers(job: Job, program: str = PROGRAM) -> Workers:
    """Started as the supervisor starts them; where processes cannot be forked so, they import for themselves."""
    if sys.platform != "linux":
        return Workers(job, sys.executable, program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADDRESS_VARIABLE, _address(job).hex())
        patch.setenv(PROGRAM_VARIABLE, program)
        return Workers(job, sys.executable, "tests.training.forked")


def _address(job: Job) -> bytes:
    """Return the address of the socket of this process's warm process, which ends with this one."""
    variables = {name: value for name, value in environment(job).items() if name not in OF_ONE}
    key = frozenset(variables.items())
    if key not in _warm or _warm[key][0].poll() is not None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("")  # in Linux' abstract namespace, which leaves no file
            listener.listen()
            command = [sys.executable, "-m", "tests.training.warm", str(listener.fileno())]
            started = subprocess.Popen(
                killed_with_parent(command), env=variables, pass_fds=[listener.fileno()]
            )
            _warm[key] = started, listener.getsockname()
    return _warm[key][1]

"""A process that has imported the training stack, and becomes a rank each time one is asked for: `python -m tests.training.warm FD`.

Importing takes most of a small training's time, and leaves nothing that ranks could not share: no thread that a fork would
lack, and no variable was read that differs between them (`tests.training.forks`). So the stack is imported once, and each
rank is a fork, with the environment, the working directory and the files 0 to 2 of the process that asked for it
(`tests.training.forked`). That one is told its exit code, and its death ends the rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple, cast

from trainer.parent_death import die_with_parent
from trainer.worker.imports import QUIET, train_function, uncollected

REQUEST_BYTES = 1 << 20
MINDED = {"jemalloc_bg_thd"}
"""Threads of those who mind forks: pyarrow's allocator starts its own again (https://jemalloc.net/jemalloc.3.html#background_thread)."""


class Rank(NamedTuple):
    """One that runs."""

    pid: int
    ended: int
    """A descriptor that is readable when it has ended."""
    asked_by: socket.socket
    """Readable when the process that asked for it is gone."""


class Request(NamedTuple):
    """What a rank is to be."""

    program: str
    arguments: list[str]
    folder: str
    environ: dict[str, str]


def import_stack() -> None:
    """What the worker imports sooner or later."""
    os.environ.update(QUIET)
    with uncollected():
        import transformers.models.mistral.modeling_mistral  # noqa: F401

        train_function("sft")
        train_function("dpo")
        if "DS_ACCELERATOR" in os.environ:
            import deepspeed  # noqa: F401
    assert threads() <= MINDED, f"a fork would lack the threads {threads()}"


def threads() -> set[str]:
    """Return the threads of this process besides the first, including native ones."""
    tasks = Path("/proc/self/task").iterdir()
    return {(task / "comm").read_text().strip() for task in tasks if task.name != str(os.getpid())}


def serve(listener: socket.socket) -> Request:
    """Starts ranks and tells how they ended. Returns in the ranks alone, each of which knows nothing of the others."""
    here = os.getpid()
    ready = selectors.PollSelector()  # of no kernel object that forks would share
    ready.register(listener, selectors.EVENT_READ)
    while True:
        event, _ = ready.select()[0]  # one at a time: what it changes may be what the next is about
        rank: Rank | None = event.data
        if rank is None:
            asked_by, _ = listener.accept()
            message, files, *_ = socket.recv_fds(asked_by, REQUEST_BYTES, 3)
            if not message:  # it was killed before it could ask
                asked_by.close()
                continue
            if not (pid := os.fork()):
                die_with_parent(here)
                close_all(ready, asked_by)
                return become(Request(*json.loads(message)), files)
            for file in files:
                os.close(file)
            rank = Rank(pid, os.pidfd_open(pid), asked_by)
            ready.register(rank.ended, selectors.EVENT_READ, rank)
            ready.register(rank.asked_by, selectors.EVENT_READ, rank)
        elif event.fileobj == rank.ended:
            tell(ready, rank)
        else:
            os.kill(rank.pid, signal.SIGKILL)
            ready.unregister(rank.asked_by)


def tell(ready: selectors.BaseSelector, rank: Rank) -> None:
    """Its exit code to the process that asked for it, if that is still there; negative if a signal ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        rank.asked_by.send(str(code).encode())
    ready.unregister(rank.ended)
    os.close(rank.ended)
    with contextlib.suppress(KeyError):
        ready.unregister(rank.asked_by)
    rank.asked_by.close()


def close_all(ready: selectors.BaseSelector, asked_by: socket.socket) -> None:
    """What is the server's, in a rank."""
    for each in [asked_by, *(key.fileobj for key in ready.get_map().values())]:
        if isinstance(each, socket.socket):
            each.close()
        else:
            os.close(cast("int", each))


def become(wanted: Request, files: list[int]) -> Request:
    """What a process that was started for it would be."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(wanted.environ)
    os.chdir(wanted.folder)
    return wanted


def main() -> None:
    import_stack()
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [wanted.program, *wanted.arguments]
    runpy.run_module(wanted.program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

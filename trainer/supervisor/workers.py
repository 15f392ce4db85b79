"""The processes that train: which Python, which command, how to stop them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from trainer.errors import UserError
from trainer.job import Job
from trainer.parent_death import leashed

PYTHON_VARIABLE = "AEOLUS_TRAINER_PYTHON"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "trainer.worker"
"""The module that trains; another that keeps to the files of `trainer.job` does as well."""
EXPANDABLE = "expandable_segments:True"
"""Against fragments of memory between sequences of many lengths
(https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf)."""
PASSIVE = "passive"
"""On the CPU: threads that wait for each other sleep. By default they keep their cores busy: two programs of two threads each, on two
cores with other work, took five to thirteen times as long (https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html)."""
MEETING_PORTS = (20_000, 32_000)
"""Linux's outgoing connections have ports from 32768 on (`/proc/sys/net/ipv4/ip_local_port_range`)."""
CHANCE = random.SystemRandom()
"""Nobody's seed: two programs that set the same one would meet at one port."""
GRACE_S = 30.0
"""For the other ranks, when one has failed, to say what they know."""


class Meeting(NamedTuple):
    """Where the ranks find each other, and which of them this node has."""

    address: str = "127.0.0.1"
    port: int = 0
    node: int = 0


DEFAULT_MEETING = Meeting()


def worker_python(environ: Mapping[str, str] = os.environ, root: Path = PACKAGE_ROOT) -> str:
    """The Python that has torch: the one named, this one, or the one `make setup` made.

    The launcher's and the trainer's packages cannot share an environment (click), so on a laptop
    the supervisor often runs in one and its workers in the other.

    Raises:
        UserError: none of them is there.
    """
    if named := environ.get(PYTHON_VARIABLE):
        if not Path(named).exists():
            raise UserError(
                f"${PYTHON_VARIABLE} names {named}, which is not there",
                hint="name a Python with torch, or unset it",
            )
        return named
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    made = root / ".venv-trainer" / "bin" / "python"
    if made.exists():
        return str(made)
    raise UserError(
        f"no Python with torch: {sys.executable} has none, {made} is not there, ${PYTHON_VARIABLE} is not set",
        hint="run `make setup`, or `pip install aeolus[train]` into an environment and name its Python",
    )


def command(job_file: Path, python: str, program: str = PROGRAM) -> list[str]:
    """Of each rank; which one it is, its environment says."""
    return [python, "-m", program, str(job_file)]


def meeting() -> Meeting:
    """On this machine, at a port that is free now; below those that systems give to outgoing connections, of which the
    ranks open hundreds before the first of them listens.
    """
    while True:
        port = CHANCE.randrange(*MEETING_PORTS)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return Meeting(port=port)


def environment(
    job: Job, environ: Mapping[str, str] = os.environ, *, local_rank: int = 0, at: Meeting = DEFAULT_MEETING
) -> dict[str, str]:
    """Of one rank, with torchrun's variables if there are several, or an engine that wants them of one too.

    Threads are fixed because sums split over other numbers of threads differ in the last bits.
    """
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    ours = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(job.fit.threads),
    }
    if not job.fit.use_cpu:
        ours["PYTORCH_ALLOC_CONF"] = environ.get("PYTORCH_ALLOC_CONF", EXPANDABLE)
    else:
        ours["OMP_WAIT_POLICY"] = environ.get("OMP_WAIT_POLICY", PASSIVE)
    if job.fit.use_cpu and job.fit.is_zero:
        ours |= {
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "ACCELERATE_USE_DEEPSPEED": "true",
        }
    if job.fit.engine != "single":
        ours |= _rank_variables(job, local_rank, at)
    return {**environ, **ours}


def _rank_variables(job: Job, local_rank: int, at: Meeting) -> dict[str, str]:
    """As torchrun sets them: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables"""
    here = job.fit.processes_per_node
    return {
        "RANK": str(at.node * here + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(job.fit.processes),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": at.address,
        "MASTER_PORT": str(at.port),
    }


class Workers:
    """The processes of one attempt's training on this node, a rank each.

    They are started here and not by `accelerate launch` or torchrun. Those send the ranks SIGTERM when one of them
    fails, which is what a preemption looks like; they turn SIGTERM to themselves into 30 s and a SIGKILL; and they
    make every exit code 1, so that a rank that the kernel killed for memory looks like a bug of ours.
    """

    def __init__(
        self,
        job: Job,
        python: str,
        program: str = PROGRAM,
        *,
        at: Meeting | None = None,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        job_file = job.work / "job.json"
        job_file.write_text(job.model_dump_json())
        self._grace_s, self._clock = grace_s, clock
        self._failed_at: float | None = None
        self._exit_code: int | None = None
        at = at or (meeting() if job.fit.engine != "single" else DEFAULT_MEETING)
        self._ranks = [
            subprocess.Popen(
                leashed(command(job_file, python, program)), env=environment(job, local_rank=rank, at=at)
            )
            for rank in range(job.fit.processes_per_node)
        ]

    @property
    def pids(self) -> list[int]:
        """Of each rank of this node, in their order."""
        return [rank.pid for rank in self._ranks]

    def poll(self) -> int | None:
        """None while a rank runs, else the exit code of the first that failed, negative if a signal killed it, or 0.

        Once one has failed the others, which may wait for it for ever, have `grace_s` seconds to end.
        """
        codes = [rank.poll() for rank in self._ranks]
        self._exit_code = self._exit_code or next((code for code in codes if code), None)
        if None not in codes:
            return self._exit_code or 0
        if self._exit_code is not None:
            self._failed_at = self._failed_at or self._clock()
            if self._clock() - self._failed_at >= self._grace_s:
                self.kill()
                return self._exit_code
        return None

    def wait(self, timeout_s: float) -> None:
        """Until all have ended, or `timeout_s` seconds."""
        deadline = self._clock() + timeout_s
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - self._clock()))

    def stop(self) -> None:
        """Ask every rank to save at the next step and end."""
        for rank in self._ranks:
            rank.send_signal(signal.SIGTERM)  # does nothing once it has ended

    def kill(self) -> None:
        """Every rank, and what it has started."""
        for process in [each for rank in self._ranks for each in _tree(rank)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended between the look and the signal
                process.kill()
        for rank in self._ranks:
            rank.wait()


def _tree(rank: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A rank and all below it; empty once it has ended."""
    if rank.poll() is not None:
        return []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(rank.pid)
        return [root, *root.children(recursive=True)]
    return []

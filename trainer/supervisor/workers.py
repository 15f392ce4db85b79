"""The training processes of one node: their Python, command and environment, and how to stop them."""

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
from trainer.parent_death import killed_with_parent

PYTHON_VARIABLE = "AEOLUS_TRAINER_PYTHON"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "trainer.worker"
"""The module that trains. Any module that reads and writes the files of `trainer.job` can replace it."""
EXPANDABLE = "expandable_segments:True"
"""Reduces memory fragmentation when sequences have many different lengths
(https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf)."""
PASSIVE = "passive"
"""On the CPU, OpenMP threads sleep while they wait for each other. By default they spin and keep their cores busy.
Two programs with two threads each, on two cores with other work, then took five to thirteen times as long
(https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html)."""
RENDEZVOUS_PORTS = (20_000, 32_000)
"""Linux gives outgoing connections ports from 32768 on (`/proc/sys/net/ipv4/ip_local_port_range`)."""
_rng = random.SystemRandom()  # unseeded: trainings seed `random`, and equal seeds picked equal ports
GRACE_S = 30.0
"""How long the other ranks may continue after one has failed, so that they can report what they know."""


class Rendezvous(NamedTuple):
    """The address at which all ranks connect, and the index of this node."""

    address: str = "127.0.0.1"
    port: int = 0
    node: int = 0


DEFAULT_RENDEZVOUS = Rendezvous()


def worker_python(environ: Mapping[str, str] = os.environ, root: Path = PACKAGE_ROOT) -> str:
    """Return the path of a Python that has torch.

    The candidates are `$AEOLUS_TRAINER_PYTHON`, this Python, and the one that `make setup` created, in this order.
    The packages of the launcher and of the trainer cannot share an environment (click). On a laptop the supervisor
    therefore often runs in one environment and its workers in the other.

    Raises:
        UserError: no candidate exists.
    """
    if named := environ.get(PYTHON_VARIABLE):
        if not Path(named).exists():
            raise UserError(
                f"${PYTHON_VARIABLE} is {named}, which does not exist",
                hint="set it to a Python with torch, or unset it",
            )
        return named
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    made = root / ".venv-trainer" / "bin" / "python"
    if made.exists():
        return str(made)
    raise UserError(
        f"no Python with torch: {sys.executable} has no torch, {made} does not exist, ${PYTHON_VARIABLE} is not set",
        hint=f"run `make setup`, or `pip install aeolus[train]` into an environment and set ${PYTHON_VARIABLE}",
    )


def command(job_file: Path, python: str, program: str = PROGRAM) -> list[str]:
    """Return the command of every rank. The environment tells each rank its number."""
    return [python, "-m", program, str(job_file)]


def choose_rendezvous() -> Rendezvous:
    """Return a rendezvous on this machine, at a port that is free now.

    The port is below those of outgoing connections, because the ranks open hundreds of them before rank 0 listens.
    """
    while True:
        port = _rng.randrange(*RENDEZVOUS_PORTS)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return Rendezvous(port=port)


def environment(
    job: Job,
    environ: Mapping[str, str] = os.environ,
    *,
    local_rank: int = 0,
    at: Rendezvous = DEFAULT_RENDEZVOUS,
) -> dict[str, str]:
    """Return the environment of one rank.

    It has torchrun's variables unless the engine is `single`. The number of threads is fixed, because a sum that is
    split over another number of threads differs in its last bits.
    """
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    added = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(job.fit.threads),
    }
    if not job.fit.use_cpu:
        added["PYTORCH_ALLOC_CONF"] = environ.get("PYTORCH_ALLOC_CONF", EXPANDABLE)
    else:
        added["OMP_WAIT_POLICY"] = environ.get("OMP_WAIT_POLICY", PASSIVE)
    if job.fit.use_cpu and job.fit.is_zero:
        added |= {
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "ACCELERATE_USE_DEEPSPEED": "true",
        }
    if job.fit.engine != "single":
        added |= _rank_variables(job, local_rank, at)
    return {**environ, **added}


def _rank_variables(job: Job, local_rank: int, at: Rendezvous) -> dict[str, str]:
    """Return the variables that torchrun sets: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables"""
    ranks_per_node = job.fit.processes_per_node
    return {
        "RANK": str(at.node * ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(job.fit.processes),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": at.address,
        "MASTER_PORT": str(at.port),
    }


class Workers:
    """The training processes of one attempt on this node, one for each rank.

    `accelerate launch` and torchrun are not used, for three reasons. When one rank fails they send SIGTERM to the
    others, which looks like a preemption. When they receive SIGTERM themselves, they kill the ranks after 30 s. They
    turn every exit code into 1, so that a rank that the kernel killed for memory looks like a bug of ours.
    """

    def __init__(
        self,
        job: Job,
        python: str,
        program: str = PROGRAM,
        *,
        at: Rendezvous | None = None,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        job_file = job.work / "job.json"
        job_file.write_text(job.model_dump_json())
        self._grace_s, self._clock = grace_s, clock
        self._failed_at: float | None = None
        self._exit_code: int | None = None
        at = at or (choose_rendezvous() if job.fit.engine != "single" else DEFAULT_RENDEZVOUS)
        self._ranks = [
            subprocess.Popen(
                killed_with_parent(command(job_file, python, program)),
                env=environment(job, local_rank=rank, at=at),
            )
            for rank in range(job.fit.processes_per_node)
        ]

    @property
    def pids(self) -> list[int]:
        """The process id of each rank of this node, in order of rank."""
        return [rank.pid for rank in self._ranks]

    def poll(self) -> int | None:
        """Return None while a rank is running. Then return the exit code of the rank that failed first, or 0.

        The exit code is negative if a signal killed the rank. After a rank has failed, the others may wait for it
        forever, so they are killed after `grace_s` seconds.
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
        """Wait until all ranks have ended, for at most `timeout_s` seconds."""
        deadline = self._clock() + timeout_s
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - self._clock()))

    def stop(self) -> None:
        """Ask every rank to save after its current step and to end."""
        for rank in self._ranks:
            rank.send_signal(signal.SIGTERM)  # has no effect on a rank that has ended

    def kill(self) -> None:
        """Kill every rank and all of its child processes."""
        for process in [process for rank in self._ranks for process in _process_tree(rank)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # the process has ended in the meantime
                process.kill()
        for rank in self._ranks:
            rank.wait()


def _process_tree(rank: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a rank and all of its descendants. Empty once the rank has ended."""
    if rank.poll() is not None:
        return []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(rank.pid)
        return [root, *root.children(recursive=True)]
    return []

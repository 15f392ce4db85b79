"""The processes that train: which Python, which command, how to stop them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from trainer.errors import UserError
from trainer.job import Job
from trainer.leash import leashed

PYTHON_VARIABLE = "AEOLUS_TRAINER_PYTHON"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "trainer.worker"
"""The module that trains; another that keeps to the files of `trainer.job` does as well."""


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


def command(job: Job, job_file: Path, python: str, program: str = PROGRAM) -> list[str]:
    """One process is started as it is; several through `accelerate launch`, which sets their ranks."""
    if job.fit.processes == 1:
        return [python, "-m", program, str(job_file)]
    return [
        python, "-m", "accelerate.commands.launch", "--multi_gpu",
        "--num_processes", str(job.fit.processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "--module", program, str(job_file),
    ]  # fmt: skip


def environment(job: Job, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Threads are fixed because sums split over other numbers of threads differ in the last bits."""
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    return {
        **environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(job.fit.threads),
    }


class Workers:
    """The process tree of one attempt's training."""

    def __init__(self, job: Job, python: str, program: str = PROGRAM) -> None:
        job_file = job.work / "job.json"
        job_file.write_text(job.model_dump_json())
        self._program = program
        self._process = subprocess.Popen(
            leashed(command(job, job_file, python, program)), env=environment(job)
        )

    def poll(self) -> int | None:
        """Exit code of the tree's root, negative if killed by a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> None:
        """Until the root ends, or `timeout_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def stop(self) -> None:
        """Ask every rank to save at the next step and end; the launcher in between would kill them."""
        tree = self._tree()
        for process in [process for process in tree if self._is_rank(process)] or tree[:1]:
            _signal(process, signal.SIGTERM)

    def kill(self) -> None:
        for process in self._tree():
            _signal(process, signal.SIGKILL)
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        """The root and all below it; empty once the root has ended."""
        if self.poll() is not None:
            return []
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def _is_rank(self, process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
        except psutil.Error:
            return False
        return self._program in words and not {"accelerate.commands.launch", "trainer.leash"} & set(words)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended between the look and the signal
        process.send_signal(number)

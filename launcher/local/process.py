"""A supervisor process on this machine: start it, record it, find it again, read its log.

The supervisor outlives the launcher. Its pid file lets a later launcher find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.files import write_atomically

CLOCK_TOLERANCE_S = 5.0
"""Largest difference between two readings of one process's start time: the system clock may be adjusted."""


class LocalRecord(BaseModel):
    """The pid file of a supervisor. It holds no overrides and no environment, because both may contain a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    recipe: str
    checkpoints: str
    """Canonical address of the folder of runs."""
    pid: int
    created: float
    """Start time of the process (unix time, seconds). It tells the process from a later one with the same pid."""

    def process(self) -> psutil.Process | None:
        """Return the supervisor's process if it is still running."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < CLOCK_TOLERANCE_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Home:
    """The local folder of one run: its log, its pid file and its cancellation flag."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "supervisor.log"
        self._pid_file = path / "supervisor.json"
        self._cancelled = path / "cancelled"

    @classmethod
    def of(cls, state: Path, run_id: str, checkpoints: str) -> Home:
        """Return the run's folder under `state`; the same run id in two buckets is two runs."""
        digest = hashlib.sha256(checkpoints.encode()).hexdigest()[:8]
        return cls(state / f"{run_id}-{digest}")

    def record(self) -> LocalRecord | None:
        """Return the record of the newest supervisor that was started here, running or not."""
        try:
            return LocalRecord.model_validate_json(self._pid_file.read_text())
        except FileNotFoundError:
            return None
        except ValidationError:  # written by another version, so its process cannot be identified
            return None

    def remember(self, record: LocalRecord) -> None:
        """Write the pid file in one step."""
        write_atomically(self._pid_file, record.model_dump_json())

    @property
    def cancelled(self) -> bool:
        """Whether the user has cancelled the run. A launcher that follows it must then not restart it."""
        return self._cancelled.exists()

    def set_cancelled(self, cancelled: bool) -> None:
        if cancelled:
            self._cancelled.touch()
        else:
            self._cancelled.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock, so that two launchers cannot both find no supervisor and start one."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class LogTail:
    """Reads the lines that are appended to a log file."""

    def __init__(self, path: Path, *, last_lines: int | None = None) -> None:
        """Start at the end of the file, or `last_lines` lines before it."""
        self._path = path
        self._rest = b""
        self._offset = path.stat().st_size if path.exists() else 0
        if last_lines is not None and self._offset:
            lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
            self._offset = sum(len(line) + 1 for line in lines[: max(0, len(lines) - last_lines)])

    def new_lines(self) -> list[str]:
        """Return the complete lines since the last call. A redrawn progress bar counts as its last state."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r").rpartition("\r")[2] for line in whole]


class Supervisor:
    """A running supervisor, started by this launcher or by an earlier one."""

    def __init__(self, process: psutil.Process, child: subprocess.Popen[bytes] | None = None) -> None:
        self._process = process
        self._child = child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def created(self) -> float:
        """Start time of the process (unix time, seconds)."""
        return self._process.create_time()

    def alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def exit_code(self) -> int | None:
        """Return the exit code of an ended child, negative for a signal; None if another launcher started it."""
        return self._child.poll() if self._child is not None else None

    def terminate(self) -> None:
        """Send SIGTERM, the preemption notice: the supervisor saves, uploads, commits and ends."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.terminate()

    def leave(self) -> None:
        """Let it run on, and reap it if it ends while this launcher lives, so that no zombie stays."""
        if self._child is not None:
            threading.Thread(target=self._child.wait, daemon=True).start()

    def lose(self) -> bool:
        """Kill the supervisor and all its descendants with SIGKILL, like a machine that vanishes.

        Returns whether it was still running: a supervisor that had ended by itself was not preempted.
        """
        try:
            self._process.suspend()  # it must not start another process while its children are listed
            ran = self.alive()
            # Workers may lead sessions of their own, so killing the group is not enough.
            victims = [*self._process.children(recursive=True), self._process]
        except psutil.NoSuchProcess:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        if self._child is not None:
            return self._child.wait() == -signal.SIGKILL
        psutil.wait_procs(victims, timeout=10)
        return ran


def homes(state: Path) -> list[Home]:
    """Return the folders of the runs that were started on this machine."""
    return [Home(path) for path in state.iterdir()] if state.is_dir() else []


def attach(home: Home) -> Supervisor | None:
    """Return the supervisor of the run of `home` if it is still running."""
    record = home.record()
    process = record.process() if record else None
    return Supervisor(process) if process else None


def start(
    home: Home,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    run_id: str,
    recipe: str,
    checkpoints: str,
) -> Supervisor:
    """Start `command` in a new session, append its output to the run's log, and write the pid file."""
    home.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _private(home.log) as log:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process = psutil.Process(child.pid)
    home.remember(
        LocalRecord(
            run_id=run_id,
            recipe=recipe,
            checkpoints=checkpoints,
            pid=child.pid,
            created=process.create_time(),
        )
    )
    return Supervisor(process, child)


def supervisor_command(
    recipe: str, overrides: Sequence[str], *, checkpoints: str, run_id: str
) -> tuple[str, ...]:
    """Return the command line of one attempt."""
    options = ("--checkpoints", checkpoints, "--run-id", run_id)
    return (sys.executable, "-m", "trainer", "run", *options, "--", recipe, *overrides)


def supervisor_environment(
    environ: Mapping[str, str],
    *,
    trainer_python: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the caller's environment with this package first on Python's path.

    `-m trainer` must find this package, and not a folder of that name in the user's working directory.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    chosen = {"AEOLUS_TRAINER_PYTHON": str(trainer_python)} if trainer_python else {}
    return {
        **environ,
        **chosen,
        **(variables or {}),
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _private(path: Path) -> IO[bytes]:
    """Open the file for appending; only its owner may read it."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

"""A supervisor on this machine: a process that outlives the launcher, and how it is found again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

CLOCK_TOLERANCE_S = 5.0
"""By how much two readings of one process's start time may differ: the clock behind it is adjusted."""


class Record(BaseModel):
    """The pid file. Holds no overrides and no environment: either may carry a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    recipe: str
    checkpoints: str
    """Canonical address of the folder of runs."""
    pid: int
    created: float
    """Start of the process (unix time, seconds), so that a recycled pid is not taken for it."""

    def process(self) -> psutil.Process | None:
        """The supervisor, if it still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < CLOCK_TOLERANCE_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Home:
    """What this machine keeps of one run: its log, its pid file, whether it was cancelled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "supervisor.log"
        self._pid_file = path / "supervisor.json"
        self._cancelled = path / "cancelled"

    @classmethod
    def of(cls, state: Path, run_id: str, checkpoints: str) -> Home:
        """The run's folder under `state`; the same run id in two buckets is two runs."""
        digest = hashlib.sha256(checkpoints.encode()).hexdigest()[:8]
        return cls(state / f"{run_id}-{digest}")

    def record(self) -> Record | None:
        """The newest supervisor that was started here, dead or alive."""
        try:
            return Record.model_validate_json(self._pid_file.read_text())
        except FileNotFoundError:
            return None
        except ValidationError:  # another version's: what it started cannot be told apart from nothing
            return None

    def remember(self, record: Record) -> None:
        partial = self._pid_file.with_suffix(".partial")
        partial.write_text(record.model_dump_json())
        partial.replace(self._pid_file)

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants the run to stop: whoever follows it must not recover it."""
        return self._cancelled.exists()

    def set_cancelled(self, cancelled: bool) -> None:
        if cancelled:
            self._cancelled.touch()
        else:
            self._cancelled.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Between looking for a supervisor and starting one, nobody else does either."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class LogTail:
    """The lines that are appended to a log, from a place on."""

    def __init__(self, path: Path, *, last_lines: int | None = None) -> None:
        """From the present end on; with `last_lines`, from that many lines before it."""
        self._path = path
        self._rest = b""
        self._offset = path.stat().st_size if path.exists() else 0
        if last_lines is not None and self._offset:
            lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
            self._offset = sum(len(line) + 1 for line in lines[: max(0, len(lines) - last_lines)])

    def new_lines(self) -> list[str]:
        """Whole lines since the last call; of a bar that was drawn over and over, its last state."""
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
        """When it was started (unix time, seconds)."""
        return self._process.create_time()

    def alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def exit_code(self) -> int | None:
        """Once it has ended: its exit code, negative for a signal; None if only its parent was told."""
        return self._child.poll() if self._child is not None else None

    def terminate(self) -> None:
        """Notice: it saves, uploads, commits and ends."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.terminate()

    def leave(self) -> None:
        """Let it run on; should it end while we live, it must not stay as a zombie."""
        if self._child is not None:
            threading.Thread(target=self._child.wait, daemon=True).start()

    def lose(self) -> bool:
        """Kill it and all that it started with SIGKILL, as a machine that vanishes does.

        Returns whether it ran until then: one that ended by itself meanwhile was not preempted.
        """
        try:
            self._process.suspend()  # so that it starts nothing more while we look
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


def attach(home: Home) -> Supervisor | None:
    """The supervisor that still runs for the run of `home`."""
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
    """Start `command` in a session of its own, its output appended to the run's log, and remember it."""
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
        Record(
            run_id=run_id,
            recipe=recipe,
            checkpoints=checkpoints,
            pid=child.pid,
            created=process.create_time(),
        )
    )
    return Supervisor(process, child)


def known(state: Path) -> list[tuple[Home, Record]]:
    """The runs that were started on this machine, the latest first."""
    homes = [Home(path) for path in state.iterdir()] if state.is_dir() else []
    found = [(home, record) for home in homes if (record := home.record())]
    return sorted(found, key=lambda entry: entry[1].created, reverse=True)


def _private(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

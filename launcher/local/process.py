"""A supervisor on this machine: a process that outlives the launcher, and how it is found again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from launcher.registry.local import Home, LocalRecord


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
        LocalRecord(
            run_id=run_id,
            recipe=recipe,
            checkpoints=checkpoints,
            pid=child.pid,
            created=process.create_time(),
        )
    )
    return Supervisor(process, child)


def _private(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

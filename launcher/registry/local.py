"""The runs that were started on this machine: their folders and records."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.files import write_atomically

CLOCK_TOLERANCE_S = 5.0
"""By how much two readings of one process's start time may differ: the clock behind it is adjusted."""


class LocalRecord(BaseModel):
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

    def record(self) -> LocalRecord | None:
        """The newest supervisor that was started here, dead or alive."""
        try:
            return LocalRecord.model_validate_json(self._pid_file.read_text())
        except FileNotFoundError:
            return None
        except ValidationError:  # another version's: what it started cannot be told apart from nothing
            return None

    def remember(self, record: LocalRecord) -> None:
        write_atomically(self._pid_file, record.model_dump_json())

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


def known(state: Path) -> list[tuple[Home, LocalRecord]]:
    """The runs that were started on this machine, the latest first."""
    homes = [Home(path) for path in state.iterdir()] if state.is_dir() else []
    found = [(home, record) for home in homes if (record := home.record())]
    return sorted(found, key=lambda entry: entry[1].created, reverse=True)

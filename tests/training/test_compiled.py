"""DeepSpeed's code for the host: a process that is killed while it compiles does not block later processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, wait_until
from trainer.worker.engine import _compile_lock

COMPILES = """
import sys, time
from trainer.worker.engine import _compile_lock
with _compile_lock("an_op"):
    print("mine", flush=True)
    open(sys.argv[1], "w").close()  # as torch does
    time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file by which torch marks a running compilation."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with _compile_lock("an_op"):
        [folder] = tmp_path.rglob("an_op")
    return folder / "lock"


def test_a_killed_compilation_does_not_block_later_ones(lock: Path) -> None:
    """Torch's file would block every later process until a user removes it."""
    with subprocess.Popen([sys.executable, "-c", COMPILES, str(lock)], cwd=ROOT) as killed:
        wait_until(lock.exists, "the compilation")
        killed.send_signal(signal.SIGKILL)
    with _compile_lock("an_op"):
        assert not lock.exists()


def test_the_file_of_another_program_stays(lock: Path) -> None:
    """That program removes its file itself, and would fail if the file were missing."""
    lock.touch()
    with _compile_lock("an_op"):
        assert lock.exists()


def test_one_compiles_at_a_time(lock: Path) -> None:
    """A process waits for the holder of the lock, whether torch's file exists or not."""
    with _compile_lock("an_op"):
        waiting = subprocess.Popen(
            [sys.executable, "-c", COMPILES, str(lock)], cwd=ROOT, stdout=subprocess.PIPE
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(8)  # longer than its imports take
        assert not lock.exists()
    with waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"mine\n"
        waiting.kill()

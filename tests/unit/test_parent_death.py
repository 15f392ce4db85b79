"""A worker does not outlive its supervisor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
import subprocess, sys, time
from trainer.parent_death import killed_with_parent
child = subprocess.Popen(killed_with_parent([sys.executable, "-c", "import time; time.sleep(600)"]))
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_worker_dies_with_its_parent() -> None:
    """SIGKILL of the supervisor also ends its workers, so that they free the GPU."""
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = psutil.Process(int(holder.stdout.readline()))
        assert child.is_running()
        holder.kill()
    gone, alive = psutil.wait_procs([child], timeout=30)
    assert gone == [child]
    assert not alive


def test_a_process_whose_parent_is_gone_already_dies_at_once() -> None:
    """The parent may end before the child has asked to be killed with it."""
    nobody = "1" if psutil.Process().ppid() != 1 else "999999"
    done = subprocess.run(
        [sys.executable, "-m", "trainer.parent_death", nobody, sys.executable, "-c", "print('lived')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9
    assert "lived" not in done.stdout

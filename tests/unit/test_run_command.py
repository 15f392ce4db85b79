"""`python -m trainer run`, as a task's `run:` calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from trainer.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]


def test_several_nodes_are_refused_before_they_fight_over_the_run(tmp_path: Path) -> None:
    """Each would claim the run from the other; nothing is written, and a recovery is not asked for."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", "zephyr-tiny/dpo", "--checkpoints", str(tmp_path / "runs")],
        cwd=ROOT,
        env={**os.environ, "SKYPILOT_NUM_NODES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.CONFIG
    assert "2 nodes were started for one run" in done.stderr
    assert not (tmp_path / "runs").exists()

"""`python -m trainer run`, as a task's `run:` calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import work_folder
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


def test_a_typo_is_named_and_not_recovered(tmp_path: Path) -> None:
    """SkyPilot gives up a job that ends with this exit code."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trainer",
            "run",
            "zephyr-tiny/dpo",
            "learning_rat=1e-4",
            "--checkpoints",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.CONFIG
    assert "did you mean `learning_rate`" in done.stderr


def test_runs_of_one_name_in_two_places_share_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`./runs` here and there are two buckets; one bucket is one, with or without a slash at its end."""
    names = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        names.append(work_folder("demo", "./runs"))
    assert names[0] != names[1]
    assert work_folder("demo", str(tmp_path / "there" / "runs")) == names[1]
    assert work_folder("demo", "s3://bucket/runs/") == work_folder("demo", "s3://bucket/runs")

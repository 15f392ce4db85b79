"""A real save to a file system that is too small for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import tmpfs
from tests.training.jobs import SMALL, make_job
from trainer.disk_full import reserve_disk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which holds one checkpoint of the smallest model and no second one."""
    with tmpfs(tmp_path / "small", mib=1) as folder:
        yield folder


def test_a_save_that_does_not_fit_is_an_outcome_and_leaves_nothing_half_written(small: Path) -> None:
    """Whichever package fails: no traceback, no unfinished folder, and a message with the numbers."""
    job = make_job(small / "work", "zephyr-tiny/sft", *SMALL, "save_steps=1", "max_steps=20")
    reserve_disk(job.work)
    file = job.work / "job.json"
    file.write_text(job.model_dump_json())
    ended = subprocess.run(
        [sys.executable, "-m", "trainer.worker", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1
    outcome = json.loads(job.outcome.read_text())
    assert outcome["status"] == "no_room"
    assert f"no room left in {job.staging}" in outcome["message"]
    folders = {path.name for path in job.staging.iterdir() if path.is_dir()}
    assert folders == {path.name.removesuffix(".staged") for path in job.staging.glob("*.staged")}

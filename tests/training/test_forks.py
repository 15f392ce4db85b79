"""Ranks that are forks of a warm process are what started ones are, and end as those do.

That they take the same steps, `test_engines` shows of every engine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import wait_until
from tests.training import forks
from tests.training.ranks import finish, ranks_job
from tests.training.test_engines import ENGINES, SFT
from trainer.job import Job
from trainer.supervisor.workers import Workers

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere ranks are started for the tests too"
)
TELLING = "tests.training.telling_rank"
ASKING = """
import sys
from pathlib import Path
from tests.training import forks
from trainer.job import Job
workers = forks.workers(Job.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2])
workers.wait(600)
"""


def telling(work: Path, ends: str, kind: str = "ddp") -> Job:
    return ranks_job(work, SFT, **ENGINES[kind]).model_copy(update={"run_id": ends})


def told(job: Job) -> list[dict[str, Any]]:
    files = [job.work / f"{rank}.json" for rank in range(job.fit.processes)]
    wait_until(lambda: all(file.exists() for file in files), what="the ranks tell", timeout_s=240)
    return [json.loads(file.read_text()) for file in files]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_fork_has_what_a_started_rank_has(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each its process, its variables and its folder, the test's output, and its exit code; but torch is there already."""
    with capfd.disabled():  # the warm process, begun by now, has another output
        assert finish(forks.workers(telling(tmp_path / "first", "0"), TELLING)) == 0
    jobs = {kind: telling(tmp_path / kind, "3") for kind in ("forked", "started")}
    assert finish(forks.workers(jobs["forked"], TELLING)) == 3
    assert sorted(capfd.readouterr().out.splitlines()) == ["True"] * 2
    assert finish(Workers(jobs["started"], sys.executable, TELLING)) == 3
    assert capfd.readouterr() == ("False\n" * 2, "err\n" * 2)
    forked, started = told(jobs["forked"]), told(jobs["started"])
    assert len({rank["pid"] for rank in forked}) == 2
    for mine, theirs in zip(forked, started, strict=True):
        del mine["environ"]["MASTER_PORT"], theirs["environ"]["MASTER_PORT"]
        assert (mine["environ"], mine["folder"]) == (theirs["environ"], theirs["folder"])
    assert [rank["environ"]["RANK"] for rank in forked] == ["0", "1"]


def test_other_variables_are_another_warm_process(tmp_path: Path) -> None:
    """What an import reads is what it would be in a started rank."""
    parents = []
    for number, kind in enumerate(("ddp", "zero3", "ddp")):
        job = telling(tmp_path / str(number), "wait", kind)
        workers = forks.workers(job, TELLING)
        try:
            parents += [{psutil.Process(rank["pid"]).ppid() for rank in told(job)}]
        finally:
            workers.kill()
    assert parents[0] == parents[2]
    assert not parents[0] & parents[1]


def test_a_killed_rank_leaves_no_fork(tmp_path: Path) -> None:
    """`Workers` knows the process that asked for the fork, and kills that."""
    job = telling(tmp_path / "job", "wait")
    workers = forks.workers(job, TELLING)
    try:
        pids = [rank["pid"] for rank in told(job)]
        assert not any(map(gone, pids))
    finally:
        workers.kill()
    wait_until(lambda: all(map(gone, pids)), what="the forks end")


def test_a_fork_that_a_signal_ends_is_told_as_such(tmp_path: Path) -> None:
    """As the kernel does where memory is short."""
    job = telling(tmp_path / "job", "wait")
    workers = forks.workers(job, TELLING)
    try:
        os.kill(told(job)[1]["pid"], signal.SIGUSR2)
        wait_until(lambda: gone(workers.pids[1]), what="the process that asked for it ends too")
        workers.poll()
    finally:
        workers.kill()
    assert workers.poll() == -signal.SIGUSR2


def test_a_killed_test_process_leaves_nothing(tmp_path: Path) -> None:
    """Neither forks, nor those who asked for them, nor the warm process."""
    job = telling(tmp_path / "job", "wait")
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    tests = subprocess.Popen([sys.executable, "-c", ASKING, str(file), TELLING])
    try:
        pids = {rank["pid"] for rank in told(job)}
        pids |= {child.pid for child in psutil.Process(tests.pid).children(recursive=True)}
        assert len(pids) == 5
    finally:
        tests.kill()
        tests.wait()
    wait_until(lambda: all(map(gone, pids)), what="all processes end")

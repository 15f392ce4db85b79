"""Runs on this machine: the supervisor's command line, and the verbs of the command line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from launcher.local import process
from launcher.local.follow import Ending, Follower, FollowOptions, Submission, detached_text
from launcher.local.process import LogTail
from launcher.local.progress import view_on
from launcher.local.signals import Signals
from launcher.registry.local import Home
from launcher.runs import limits
from launcher.runs.run import Reader, RunHistory
from trainer.bucket import open_run


def supervisor_command(
    recipe: str, overrides: Sequence[str], *, checkpoints: str, run_id: str
) -> tuple[str, ...]:
    """The command line of one attempt."""
    options = ("--checkpoints", checkpoints, "--run-id", run_id)
    return (sys.executable, "-m", "trainer", "run", *options, "--", recipe, *overrides)


def supervisor_environment(
    environ: Mapping[str, str], *, trainer_python: Path | None = None, told: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The caller's, so that `-m trainer` is this package's and no folder of that name where the user stands."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    chosen = {"AEOLUS_TRAINER_PYTHON": str(trainer_python)} if trainer_python else {}
    return {
        **environ,
        **chosen,
        **(told or {}),
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def submit(
    job: Submission, wishes: FollowOptions, *, state: Path, console: Console
) -> tuple[Ending, RunHistory]:
    """Bring the run to its end, or leave it at work if the user wants that; a done run is left as it is.

    Raises:
        BucketError, Unavailable: the run's bucket cannot be read.
        UserError: its budget or deadline is used up.
    """
    home = Home.of(state, job.run_id, job.checkpoints)
    reader = Reader(open_run(job.checkpoints, job.run_id), job.run_id)
    run = reader.read()
    if run.state == "done":
        return Ending("done", f"run {job.run_id} is done since {run.finished}: {run.final_uri}"), run
    if process.attach(home) is None:
        limits.refuse_used_up(run, job.limits, now=datetime.now(UTC))
    elif told := limits.changed_limits_note(run, job.limits):
        console.print(told, markup=False, soft_wrap=True)
    with Signals() as signals, view_on(console) as view:
        follower = Follower(job, home, reader, view, signals, wishes)
        supervisor = follower.begin()
        if wishes.detach:
            supervisor.leave()
            return Ending("detached", detached_text(supervisor, home)), follower.run
        return follower.follow(supervisor), follower.run


def print_log(
    home: Home, echo: Callable[[str], None], *, follow: bool, last_lines: int | None = None
) -> None:
    """The log from its beginning, or its last lines; with `follow`, until the supervisor ends."""
    log = LogTail(home.log, last_lines=sys.maxsize if last_lines is None else last_lines)
    while True:
        supervisor = process.attach(home)  # looked at first, so that nothing written before its end is missed
        for line in log.new_lines():
            echo(line)
        if not follow or supervisor is None:
            return
        time.sleep(0.3)

"""Measure the time from a lost machine to the next step, and where it is spent: `python -m bench.recovery [--times N]`.

A managed job on the laboratory of the tests (`tests/e2e/lab`): a real SkyPilot over a real Slurm of this one machine.
Each time every process of the node is killed, and Slurm ends the job, as it does for a lost node.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

import psutil

from tests.e2e.jobs import ARRIVES_S, Job, reached
from tests.e2e.lab.lab import TRAINER, Lab, lab
from tests.harness import wait_until
from tests.servers.s3 import FaultyS3
from trainer.events import Event

SAVE_STEPS = 20
ENDLESS = ("max_steps=100000", f"save_steps={SAVE_STEPS}", "eval_strategy=no", "logging_steps=1")
BEYOND = 10
"""Steps of the attempt after which the machine is lost."""
IMPORTS = "from trl import DPOConfig, DPOTrainer"


class Recovery(NamedTuple):
    """The seconds of each phase, in order."""

    noticed: float
    """Until SkyPilot has asked for another machine."""
    set_up: float
    """The machine, SkyPilot's runtime on it, the code, `setup`, until `python -m trainer run` starts."""
    claimed: float
    """The supervisor starts, reads the recipe, plans, claims the run."""
    restored: float
    """The checkpoint is chosen, downloaded and verified."""
    loaded: float
    """The worker imports torch and TRL, loads model, data and optimizer."""
    stepped: float
    """The first step is trained and reported."""


WORDS = {
    "noticed": "SkyPilot sees it and asks for a machine",
    "set_up": "SkyPilot has the machine set up",
    "claimed": "supervisor starts, claims the run",
    "restored": "checkpoint restored and verified",
    "loaded": "imports, model, data, optimizer",
    "stepped": "first step",
}
OURS = ("claimed", "restored")
"""The phases that the same job without our code would not have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="Machines to lose.")
    times: int = parser.parse_args().times
    with lab() as made, reached(made), FaultyS3(made.secrets["AWS_ENDPOINT_URL"]) as store:
        job = Job(made, "recovery", store)
        job.submit("--detach", *ENDLESS)
        show([recover(made, job, attempt) for attempt in range(1, times + 1)])
        job.launcher.run("cancel", job.name)
    print(f"\n{IMPORTS}: {statistics.median(imports() for _ in range(3)):.1f} s on this machine, idle")


def recover(made: Lab, job: Job, attempt: int) -> Recovery:
    """Lose the machine of an attempt, and follow the next one to its first step."""
    began = first_step(job, attempt)
    reach = began + SAVE_STEPS + BEYOND
    wait_until(lambda: job.step() >= reach, f"step {reach}", timeout_s=ARRIVES_S, poll_s=0.05)
    before = job.slurm_job()
    lost = time.time()
    job.lose_machine()
    wait_until(
        lambda: any(name.startswith(job.name) for key, name in made.slurm.jobs().items() if key != before),
        "another machine to be asked for",
        timeout_s=ARRIVES_S,
        poll_s=0.3,
    )
    asked = time.time()
    started = wait_until(lambda: supervisor(job), "the supervisor", timeout_s=ARRIVES_S, poll_s=0.3)
    first_step(job, attempt + 1)
    events = [event for event in job.view.events() if event["attempt"] == attempt + 1]
    marks = [lost, asked, started]
    marks += [at(events, kind) for kind in ("claimed", "restored", "started", "step")]
    return Recovery(*(after - before for before, after in pairwise(marks)))


def first_step(job: Job, attempt: int) -> int:
    def found() -> int | None:
        steps = [event["step"] for event in job.view.events("step") if event["attempt"] == attempt]
        return min(steps, default=None)

    step: int = wait_until(found, f"attempt {attempt} to step", timeout_s=ARRIVES_S, poll_s=2.0)
    return step


def supervisor(job: Job) -> float | None:
    """Return the unix time at which the run's supervisor started; None while there is none."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if line[1:4] == ["-m", "trainer", "run"] and job.name in line:
                return process.create_time()
    return None


def at(events: list[Event], kind: str) -> float:
    first = next(event for event in events if event["kind"] == kind)
    return datetime.fromisoformat(first["time"]).timestamp()


def imports() -> float:
    """Return the seconds of a fresh process that imports what every program with TRL imports."""
    start = time.perf_counter()
    subprocess.run([TRAINER, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - start


def show(recoveries: list[Recovery]) -> None:
    whole = statistics.median(sum(each) for each in recoveries)
    print(f"{len(recoveries)} lost machines, {os.cpu_count()} cores, seconds; medians (least, most)\n")
    for name, least, median, most in rows(recoveries):
        share = f"{median / whole:6.1%}"
        print(f"{WORDS[name]:42} {median:6.2f}  ({least:.2f}, {most:.2f}) {share}{'  ours' * (name in OURS)}")
    print(f"{'lost machine to next step':42} {whole:6.2f}")


def rows(recoveries: list[Recovery]) -> Iterator[tuple[str, float, float, float]]:
    for name in Recovery._fields:
        column = [getattr(each, name) for each in recoveries]
        yield name, min(column), statistics.median(column), max(column)


if __name__ == "__main__":
    main()

"""Run the two sides of `bench/train.py`: `python -m trainer run` and TRL's own scripts, as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil
import yaml
from train_worker import PLAIN, TIMES

REFERENCE = re.compile(r"Computing reference log probs for train dataset:.*?(\d+)/(\d+)")
CACHED = re.compile(r"the reference's log-probabilities: \d+ pairs computed in ([\d.]+) s")
SUPERVISOR = re.compile(r"supervisor's CPU: ([\d.]+)")


class Trained(NamedTuple):
    """The measured times of one training."""

    losses: list[float]
    step_s: list[float]
    """Seconds of the steps, without the first, which cannot be separated from the time before it."""
    reference_s: float
    """Seconds of the pass that computes the reference's log-probabilities; 0 without one."""
    wall_s: float
    """Seconds of the whole command."""
    step_cpu_s: list[float]
    """CPU seconds of the training process for the same steps, which other processes hardly change."""
    reference_cpu_s: float
    times: Mapping[str, float] = MappingProxyType({})
    """Total seconds that our code adds to the steps, by purpose."""
    supervisor: float = 0.0
    """CPU seconds of the supervisor per second of the run."""


class Moment(NamedTuple):
    """A wall clock and a CPU clock."""

    wall_s: float
    cpu_s: float
    """CPU seconds that the command has used so far."""


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        used = psutil.Process(pid).cpu_times()
        return float(used.user + used.system)
    return 0.0


def environment(device: str, home: Path) -> dict[str, str]:
    """Return an environment with caches in a folder of this case, so that no case reuses another's results, and no Hub."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    cache = {"HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, **hidden, **cache, "PYTHONUNBUFFERED": "1", "PYTHONPATH": root}


def trl(method: str, settings: Mapping[str, Any], folder: Path, *, device: str) -> Trained:
    """Run `trl/scripts/{method}.py --config FILE`, and time its steps by the arrival of their lines."""
    import trl as package

    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "out")}))
    script = Path(package.__file__).parent / "scripts" / f"{method}.py"
    began, at, passed = time.perf_counter(), list[Moment](), list[Moment]()
    command = [sys.executable, str(script), "--config", str(config)]
    for now, line in _lines(command, environment(device, folder), folder / "log"):
        if REFERENCE.search(line):
            passed.append(now)
        elif line.startswith("{'loss':"):
            at.append(now)
    wall_s = time.perf_counter() - began
    state = json.loads((folder / "out" / f"checkpoint-{len(at)}" / "trainer_state.json").read_text())
    losses = [
        float(line["loss"]) for line in state["log_history"] if "loss" in line
    ]  # printed with fewer digits
    wall, cpu = ([later[clock] - earlier[clock] for earlier, later in pairwise(at)] for clock in (0, 1))
    pass_s, pass_cpu_s = (passed[-1][clock] - passed[0][clock] if passed else 0.0 for clock in (0, 1))
    return Trained(losses, wall, pass_s, wall_s, cpu, pass_cpu_s)


def ours(recipe: Mapping[str, Any], folder: Path, *, device: str, plain: bool) -> Trained:
    """Run what `python -m trainer run FILE` runs, with a stopwatch. The run's events have the times of its steps."""
    folder.mkdir(parents=True)
    file, bucket, times = folder / "recipe.yaml", folder / "bucket", folder / "times.json"
    file.write_text(yaml.safe_dump(dict(recipe)))
    environ = {**environment(device, folder), TIMES: str(times), **({PLAIN: "1"} if plain else {})}
    program = str(Path(__file__).with_name("train_worker.py"))
    command = [sys.executable, program, str(file), str(bucket), str(folder / "work")]
    began, reference_s, supervisor = time.perf_counter(), 0.0, 0.0
    for _, line in _lines(command, environ, folder / "log"):
        if found := CACHED.search(line):
            reference_s = float(found[1])
        elif found := SUPERVISOR.search(line):
            supervisor = float(found[1])
    wall_s = time.perf_counter() - began
    lines = (bucket / "run" / "events" / "0001.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["kind"] == "step"]
    losses, step_s = [float(event["loss"]) for event in steps], [event["step_s"] for event in steps[1:]]
    seen = json.loads(times.read_text())
    cpu = [later - earlier for earlier, later in pairwise(seen["steps"])]
    return Trained(
        losses, step_s, reference_s, wall_s, cpu, sum(seen["reference"]), seen["times"], supervisor
    )


def _lines(command: list[str], environ: dict[str, str], log: Path) -> Iterator[tuple[Moment, str]]:
    """Yield the lines (or progress bar states) of a command with their times of arrival, and write all of them to a log.

    Raises:
        RuntimeError: it failed.
    """
    with (
        log.open("wb") as copy,
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None  # noqa: S101 (a pipe was asked for)
        rest = b""
        while part := os.read(process.stdout.fileno(), 2**16):
            now = Moment(time.perf_counter(), _cpu_s(process.pid))
            copy.write(part)
            *whole, rest = re.split(rb"[\r\n]", rest + part)
            yield from ((now, line.decode(errors="replace")) for line in whole)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")

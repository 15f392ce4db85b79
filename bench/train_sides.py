"""The two sides of `bench/train.py`: `python -m trainer run` and TRL's own scripts, each as a user starts it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REFERENCE = re.compile(r"Computing reference log probs for train dataset:.*?(\d+)/(\d+)")
CACHED = re.compile(r"the reference's log-probabilities: \d+ pairs computed in ([\d.]+) s")
OURS_ONLY = {"micro_batch_size", "global_batch_size", "auto_insert_empty_system_msg"}


class Trained(NamedTuple):
    """What one training took."""

    losses: list[float]
    step_s: list[float]
    """Without the first step, which the time before it cannot be told from."""
    reference_s: float
    """Of the pass that computes the reference's log-probabilities; 0 without one."""
    wall_s: float
    """Of the whole command."""
    notes: str


def environment(device: str, home: Path) -> dict[str, str]:
    """Caches in a folder of this case, so that nobody finds what another has computed; no way to the Hub."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    cache = {"HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, **hidden, **cache, "PYTHONUNBUFFERED": "1", "PYTHONPATH": root}


def trl(method: str, settings: Mapping[str, Any], folder: Path, *, device: str) -> Trained:
    """`trl/scripts/{method}.py --config FILE`; its steps are timed by when their lines arrive."""
    import trl as package

    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "out")}))
    script = Path(package.__file__).parent / "scripts" / f"{method}.py"
    began, losses, at, passed = time.perf_counter(), [], [], []
    command = [sys.executable, str(script), "--config", str(config)]
    for now, line in _lines(command, environment(device, folder), folder / "log"):
        if REFERENCE.search(line):
            passed.append(now)
        elif line.startswith("{'loss':"):
            losses.append(float(ast.literal_eval(line)["loss"]))
            at.append(now)
    wall_s = time.perf_counter() - began
    steps = [later - earlier for earlier, later in zip(at, at[1:], strict=False)]
    return Trained(losses, steps, passed[-1] - passed[0] if passed else 0.0, wall_s, "")


def ours(recipe: Mapping[str, Any], folder: Path, *, device: str) -> Trained:
    """`python -m trainer run FILE`; the run's events say how long its steps were."""
    folder.mkdir(parents=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(recipe)))
    bucket = folder / "bucket"
    command = [sys.executable, "-m", "trainer", "run", str(file), "--checkpoints", str(bucket)]
    command += ["--run-id", "run", "--work", str(folder / "work")]
    began, reference_s = time.perf_counter(), 0.0
    for _, line in _lines(command, environment(device, folder), folder / "log"):
        if found := CACHED.search(line):
            reference_s = float(found[1])
    wall_s = time.perf_counter() - began
    lines = (bucket / "run" / "events" / "0001.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["kind"] == "step"]
    fit = next(event["fit"] for event in events if event["kind"] == "claimed")
    notes = f"micro batch {fit['micro_batch']} x {fit['accumulation']}" if device == "cuda" else ""
    losses = [float(event["loss"]) for event in steps]
    return Trained(losses, [event["step_s"] for event in steps[1:]], reference_s, wall_s, notes)


def _lines(command: list[str], environ: dict[str, str], log: Path) -> Iterator[tuple[float, str]]:
    """What a command says, each line (or state of a progress bar) with the second it arrived in; all of it goes to a log.

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
            now = time.perf_counter()
            copy.write(part)
            *whole, rest = re.split(rb"[\r\n]", rest + part)
            yield from ((now, line.decode(errors="replace")) for line in whole)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {log.read_text()[-2000:]}")

"""Run a real `python -m trainer run` in a test: start it, read its bucket, kill it like a lost machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from trainer.bucket import Bucket, open_run
from trainer.bucket.manifest import Manifest, committed, final
from trainer.events import MEASURED, Event, of_kind, parse

ROOT = Path(__file__).resolve().parents[1]
SLICE_S = 0.2
"""A few steps of a tiny model."""
LOOK_S = 1.0
"""Much less than a process takes from its start to its first step."""


def wait_until(
    condition: Callable[[], Any], what: str, *, timeout_s: float = 240.0, poll_s: float = 0.02
) -> Any:
    """Return the first true value of `condition`; fail the test, with `what`, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain: {what}"
        time.sleep(poll_s)
    return value


def run_in_slices(
    processes: Callable[[], Iterable[psutil.Process]], until: Callable[[], Any], what: str
) -> None:
    """Let processes run for moments until `until` is true, and leave them suspended.

    Whoever waits for a step of a tiny model and only then looks for its processes finds the run at its end.
    """

    def reached() -> bool:
        found = list(processes())
        _each(found, psutil.Process.resume)
        time.sleep(SLICE_S if found else LOOK_S)
        _each(found, psutil.Process.suspend)
        return bool(until())

    wait_until(reached, what, timeout_s=900.0)


def _each(processes: Iterable[psutil.Process], do: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            do(process)


class TrainerRun:
    """One attempt in its own process group, so that a kill ends all of it, like a lost machine."""

    def __init__(
        self,
        recipe: Path,
        checkpoints: str,
        run_id: str,
        work: Path,
        *,
        overrides: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        module: str = "trainer",
    ) -> None:
        self._log = work.with_suffix(".log")
        work.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, "run", str(recipe), *overrides]
        command += ["--checkpoints", checkpoints, "--run-id", run_id, "--work", str(work)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environ or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._work = work

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lose_machine()

    def lose_machine(self) -> int:
        """Send SIGKILL to every process of the attempt; return the supervisor's exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def terminate(self) -> None:
        """Send SIGTERM to the supervisor, the preemption notice of a cloud."""
        self.process.terminate()

    def wait(self, timeout_s: float = 400.0) -> int:
        return self.process.wait(timeout_s)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def staging(self) -> Path | None:
        """Return the staging folder, once the attempt has created it."""
        return self._find("*/attempt-*/staging")

    def step(self) -> int:
        """Return the worker's last step, which is known here before it is in the bucket."""
        return max((event["step"] for event in self.told("step")), default=0)

    def told(self, kind: str) -> list[Event]:
        """Return the worker's events of a kind. A killed attempt may not have uploaded them."""
        path = self._find("*/attempt-*/steps.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["kind"] == kind]

    def _find(self, pattern: str) -> Path | None:
        try:
            return next(self._work.glob(pattern), None)
        except FileNotFoundError:  # the attempt is removing what an earlier one left
            return None


class RunView:
    """Reads a run from its bucket."""

    def __init__(self, checkpoints: str, run_id: str) -> None:
        self.bucket: Bucket = open_run(checkpoints, run_id)

    def events(self, *kinds: Any) -> list[Event]:
        keys = sorted(item.key for item in self.bucket.list("events/"))
        events = [event for key in keys for event in parse(self.bucket.get(key))]
        return of_kind(events, *kinds) if kinds else events

    def committed_steps(self) -> list[int]:
        return [manifest.step for manifest in committed(self.bucket)]

    def final(self) -> Manifest | None:
        return final(self.bucket)

    def steps(self) -> dict[int, list[Event]]:
        """Return each step's events of all attempts, without the fields that differ between attempts."""
        told: dict[int, list[Event]] = {}
        for event in self.events("step", "eval"):
            told.setdefault(event["step"], []).append(
                {key: event[key] for key in sorted(event.keys() - {"time", "attempt"} - TIMES)}
            )
        return told


TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} | MEASURED
"""Fields that differ between any two runs."""

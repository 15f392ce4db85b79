"""A supervisor that does not train: `run --checkpoints FOLDER --run-id ID -- RECIPE [KEY=VALUE]...`.

It claims, restores, steps, commits and exits as `python -m trainer run` does. It works in a folder and takes no time.
The overrides control its behavior:

    steps=20 save_every=5   the length of the training, and when it commits
    stall=7,12              attempt 1 waits at step 7 until it is killed or asked to stop, attempt 2 at step 12
    step_s=0.1              the duration of a step, for watching it
    exit=78                 fails with this code, once it has claimed its attempt
    die_at=3                kills itself with SIGKILL at this step, in every attempt
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from trainer.events import EventLog
from trainer.files import write_atomically


class Trainer:
    """One attempt of a run."""

    def __init__(self, run: Path, options: dict[str, str]) -> None:
        self.run = run
        self.total = int(options.get("steps", "20"))
        self.save_every = int(options.get("save_every", "5"))
        self.stalls = [int(step) for step in options.get("stall", "").split(",") if step]
        self.step_s = float(options.get("step_s", "0"))
        self.die_at = int(options.get("die_at", "0"))
        self.stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda _number, _frame: self.stop.set())
        self.number = self._claim()
        path = run / "events" / f"{self.number:04d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        self.events = EventLog(self.number, lambda data: write_atomically(path, data.decode()))
        self.report("claimed", method="dpo", recipe="fake")

    def report(self, kind: str, **fields: object) -> None:
        self.events.add(kind, **fields)  # type: ignore[arg-type]
        self.events.flush(now=True)

    def train(self) -> int:
        start = max((int(path.stem[5:]) for path in (self.run / "commits").glob("step-*")), default=0)
        self.report("restored", step=start)
        self.report("started", step=start, total_steps=self.total)
        for step in range(start + 1, self.total + 1):
            self.report(
                "step", step=step, total_steps=self.total, loss=1 / step, **{"rewards/accuracies": 0.5}
            )
            write_log(f"step {step}/{self.total}")
            self.stop.wait(self.step_s)
            if step == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.number <= len(self.stalls) and step == self.stalls[self.number - 1]:
                self.stop.wait()
            if step % self.save_every == 0 or self.stop.is_set():
                self.commit(f"step-{step:08d}")
                self.report("committed", step=step)
            if self.stop.is_set():
                self.report("preempted", message=f"at step {step}")
                return 75
        self.commit("final")
        self.report("exported", step=self.total, bytes=4096, weights_digest="fa4e")
        self.report("done", step=self.total)
        return 0

    def commit(self, name: str) -> None:
        (self.run / "commits").mkdir(exist_ok=True)
        manifest = {"attempt": self.number, "created": datetime.now(UTC).isoformat()}
        write_atomically(self.run / "commits" / f"{name}.json", json.dumps(manifest))

    def _claim(self) -> int:
        number = 1
        while (self.run / "attempts" / f"{number:04d}.json").exists():
            number += 1
        (self.run / "attempts").mkdir(parents=True, exist_ok=True)
        (self.run / "attempts" / f"{number:04d}.json").write_text("{}")
        return number


def write_log(line: str) -> None:
    """Write a line to the log."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--run-id")
    parser.add_argument("words", nargs="+")
    arguments = parser.parse_args()
    options = dict(word.split("=", 1) for word in arguments.words[1:])
    trainer = Trainer(arguments.checkpoints / arguments.run_id, options)
    if code := int(options.get("exit", "0")):
        write_log("error: the fake was told to fail")
        trainer.report("failed", message="the fake was told to fail", exit_code=code)
        return code
    return trainer.train()


if __name__ == "__main__":
    sys.exit(main())

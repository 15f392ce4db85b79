"""A supervisor that trains nothing: `run --checkpoints FOLDER --run-id ID -- RECIPE [KEY=VALUE]...`.

Claims, restores, steps, commits and exits as `python -m trainer run` does, into a folder, in no time.
How it behaves is told by the overrides:

    steps=20 save_every=5   the length of the training, and when it commits
    stall=7,12              attempt 1 waits at step 7 until it is killed or told to stop, attempt 2 at 12
    step_s=0.1              the duration of a step, to look at
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
    """One attempt."""

    def __init__(self, run: Path, options: dict[str, str]) -> None:
        self.run = run
        self.total = int(options.get("steps", "20"))
        self.save_every = int(options.get("save_every", "5"))
        self.stalls = [int(step) for step in options.get("stall", "").split(",") if step]
        self.step_s = float(options.get("step_s", "0"))
        self.die_at = int(options.get("die_at", "0"))
        self.told_to_stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda _number, _frame: self.told_to_stop.set())
        self.number = self._claim()
        path = run / "events" / f"{self.number:04d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        self.events = EventLog(self.number, lambda data: write_atomically(path, data.decode()))
        self.tell("claimed", method="dpo", recipe="fake")

    def tell(self, kind: str, **fields: object) -> None:
        self.events.add(kind, **fields)  # type: ignore[arg-type]
        self.events.flush(now=True)

    def train(self) -> int:
        start = max((int(path.stem[5:]) for path in (self.run / "commits").glob("step-*")), default=0)
        self.tell("restored", step=start)
        self.tell("started", step=start, total_steps=self.total)
        for step in range(start + 1, self.total + 1):
            self.tell("step", step=step, total_steps=self.total, loss=1 / step, **{"rewards/accuracies": 0.5})
            say(f"step {step}/{self.total}")
            self.told_to_stop.wait(self.step_s)
            if step == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.number <= len(self.stalls) and step == self.stalls[self.number - 1]:
                self.told_to_stop.wait()
            if step % self.save_every == 0 or self.told_to_stop.is_set():
                self.commit(f"step-{step:08d}")
                self.tell("committed", step=step)
            if self.told_to_stop.is_set():
                self.tell("preempted", message=f"at step {step}")
                return 75
        self.commit("final")
        self.tell("exported", step=self.total, bytes=4096, weights_digest="fa4e")
        self.tell("done", step=self.total)
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


def say(line: str) -> None:
    """To the log."""
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
        say("error: the fake was told to fail")
        trainer.tell("failed", message="the fake was told to fail", exit_code=code)
        return code
    return trainer.train()


if __name__ == "__main__":
    sys.exit(main())

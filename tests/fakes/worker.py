"""A training program that does not train. It reads and writes the files of `trainer.job` and needs no torch.

The supervisor runs it in place of `trainer.worker`. $FAKE_WORKER selects how it fails:

    (nothing)      trains 6 steps with a checkpoint every 2 steps, then saves the final model
    crash@N        raises at step N
    killed@N       is killed by SIGKILL at step N
    wrong          rejects the recipe
    away           gets no answer from the Hub
    waits@N        waits at step N until it is asked to stop, and then saves
    deaf@N         waits at step N and ignores the request to stop
    fills@N        fills the disk at step N with a file of its own

$FAKE_WORKER_MB is the size of its weights in millions of bytes (default 0.1).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from trainer.disk_full import no_room
from trainer.files import write_atomically
from trainer.job import Job, Outcome
from trainer.staged import Staged, mark_staged, pending

TOTAL_STEPS = 6
SAVE_STEPS = 2


class Program:
    """The simulated training of one attempt."""

    def __init__(self, job: Job, fate: str) -> None:
        self.job = job
        self.fate, _, at = fate.partition("@")
        self.at = int(at or 0)
        self.numbers = int(float(os.environ.get("FAKE_WORKER_MB", "0.1")) * 500_000)
        self.stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(self, kind: str, **fields: object) -> None:
        with self.job.steps.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def end(self, status: str, message: str) -> None:
        write_atomically(
            self.job.outcome, Outcome.model_validate({"status": status, "message": message}).model_dump_json()
        )

    def save(self, step: int, *, name: str, kind: str = "checkpoint") -> None:
        while pending(self.job.staging):  # a faster program would have its checkpoints dropped
            time.sleep(0.01)
        folder = self.job.staging / name
        (folder / "nested").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(step.to_bytes(2) * self.numbers)
        (folder / "nested" / "empty").touch()
        (folder / "state.json").write_text(json.dumps({"step": step}))
        mark_staged(self.job.staging, Staged.model_validate({"folder": name, "step": step, "kind": kind}))
        self.report("saved", step=step, stall_s=0.0)

    def first_step(self) -> int:
        if self.job.resume_from is None:
            return 1
        return int(json.loads((self.job.resume_from / "state.json").read_text())["step"]) + 1

    def apply_fate(self, step: int) -> None:
        if step != self.at:
            return
        match self.fate:
            case "crash":
                raise RuntimeError("the fake worker was told to crash")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "waits":
                self.stop.wait()
            case "fills":
                with (self.job.work / "filler").open("wb") as file:
                    while True:
                        file.write(bytes(100_000))
            case "deaf":
                threading.Event().wait()

    def run(self) -> None:
        if self.fate == "wrong":
            self.end("user_error", "the data is not to be had")
            sys.exit(1)
        if self.fate == "away":
            self.end("unavailable", "org/model cannot be loaded for now")
            sys.exit(1)
        first = self.first_step()
        self.report("started", step=first - 1, total_steps=TOTAL_STEPS)
        for step in range(first, TOTAL_STEPS + 1):
            self.report("step", step=step, total_steps=TOTAL_STEPS, loss=1.0 / step)
            self.apply_fate(step)
            if step % SAVE_STEPS == 0 or self.stop.is_set():
                self.save(step, name=f"checkpoint-{step}")
            if self.stop.is_set():
                self.end("preempted", f"at step {step}")
                return
        self.save(TOTAL_STEPS, name="final", kind="final")
        self.end("done", "")


if __name__ == "__main__":
    program = Program(
        Job.model_validate_json(Path(sys.argv[1]).read_text()), os.environ.get("FAKE_WORKER", "")
    )
    try:
        program.run()
    except OSError as error:
        if (full := no_room(program.job, error)) is None:
            raise
        write_atomically(program.job.outcome, full.model_dump_json())
        sys.exit(1)

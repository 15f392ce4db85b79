"""A deterministic and fast training program without torch: each step mixes the state with the step's sample.

The supervisor runs it in place of `trainer.worker`. Like the real program, it reports the loss of each step, saves
every `save_steps` steps, skips a save while two uploads are waiting, and saves and stops when it is asked to. On
several nodes, each node writes a file of its own, node 0 also writes the other files and the events, and all nodes
stop at the same step. $COUNTING_FAULT adds a fault, so that the tests of the checks can check that it is found:

    forgets        resumes at the checkpoint's step with a new state, as if the optimizer file were missing
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from tests.fakes.lockstep import Lockstep
from trainer.files import write_atomically
from trainer.job import Job, Outcome
from trainer.staged import Staged, mark_staged, pending

WEIGHT_BYTES = 4_000_000


class State:
    """The state that a step depends on."""

    def __init__(self, seed: int) -> None:
        self.step = 0
        self.weights = hashlib.sha256(str(seed).encode()).digest()

    def advance(self) -> None:
        self.step += 1
        sample = hashlib.sha256(f"sample {self.step}".encode()).digest()
        self.weights = hashlib.sha256(self.weights + sample).digest()

    @property
    def loss(self) -> float:
        return int.from_bytes(self.weights[:6]) / 2**48

    def write(self, folder: Path) -> None:
        (folder / "nested").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(self.weights * (WEIGHT_BYTES // len(self.weights)))
        (folder / "nested" / "optimizer.bin").write_bytes(self.weights[::-1] * 100)
        (folder / "state.json").write_text(json.dumps({"step": self.step, "weights": self.weights.hex()}))

    def read(self, folder: Path) -> None:
        saved = json.loads((folder / "state.json").read_text())
        self.step, self.weights = saved["step"], bytes.fromhex(saved["weights"])


class Program:
    """The training of one attempt."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stop = threading.Event()
        self.state = State(int(job.recipe.trainer_args.get("seed", 0)))
        self.total = int(job.recipe.trainer_args["max_steps"])
        self.save_steps = int(job.recipe.trainer_args["save_steps"])
        self.rank = int(os.environ.get("RANK", "0"))
        self.step_s = float(os.environ.get("COUNTING_STEP_S", "0.006"))
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(self, kind: str, **fields: object) -> None:
        if self.rank:
            return
        with self.job.steps.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def end(self, status: str, message: str = "") -> None:
        outcome = Outcome.model_validate({"status": status, "message": message})
        write_atomically(self.job.outcome, outcome.model_dump_json())

    def save(self, name: str, kind: str = "checkpoint") -> None:
        if kind == "checkpoint" and len(pending(self.job.staging)) > 1:
            self.report("save_skipped", step=self.state.step, reason="two uploads are waiting")
            return
        if self.rank == 0:
            self.state.write(self.job.staging / name)
        if self.job.fit.nodes > 1:
            self._write_own_part(self.job.staging / name)
        staged = Staged.model_validate({"folder": name, "step": self.state.step, "kind": kind})
        mark_staged(self.job.staging, staged)
        self.report("saved", step=self.state.step, stall_s=0.0)

    def _write_own_part(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"of-rank-{self.rank}.bin").write_bytes(self.state.weights)

    def resume(self) -> None:
        if self.job.resume_from is None:
            return
        if self.job.fit.nodes > 1:
            parts = sorted(self.job.resume_from.glob("of-rank-*.bin"))
            if len(parts) != self.job.fit.nodes:
                raise FileNotFoundError(f"{len(parts)} parts of {self.job.fit.nodes}")
        self.state.read(self.job.resume_from)
        if os.environ.get("COUNTING_FAULT") == "forgets":
            self.state.weights = hashlib.sha256(b"new").digest()

    def run(self) -> None:
        self.resume()
        lockstep = Lockstep(os.environ)
        self.report("started", step=self.state.step, total_steps=self.total)
        while self.state.step < self.total:
            self.state.advance()
            self.report("step", step=self.state.step, total_steps=self.total, loss=self.state.loss)
            stopping = lockstep.any(self.stop.wait(self.step_s))
            if stopping or self.state.step % self.save_steps == 0:
                self.save(f"checkpoint-{self.state.step}")
            if stopping:
                self.end("preempted", f"at step {self.state.step}")
                return
        if self.rank == 0:
            self.save("final", "final")
        self.end("done")


if __name__ == "__main__":
    Program(Job.model_validate_json(Path(sys.argv[1]).read_text())).run()

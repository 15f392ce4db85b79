"""A shipped task launched by hand on the laboratory's cluster, and its run watched in the bucket."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.e2e.lab.lab import Lab
from tests.harness import ROOT, RunView, wait_until
from tests.servers.s3 import FaultyS3

TINY = ("max_steps=12", "save_steps=4", "eval_strategy=no", "logging_steps=1")
SMALLEST = (
    "tiny.hidden_size=64",
    "tiny.intermediate_size=128",
    "tiny.num_hidden_layers=2",
    "tiny.vocab_size=600",
    "max_train_samples=60",
    "global_batch_size=8",
    "micro_batch_size=8",
)
LAST_STEP = 12
DPO = "zephyr-tiny/dpo"
ARRIVES_S = 600.0
"""Seconds in which a submitted job has to be where it is waited for; on two idle cores it takes some 60."""


class Job:
    """One managed job, whose name is also its run's."""

    def __init__(self, lab: Lab, name: str, store: FaultyS3) -> None:
        self.name = name
        self.lab = lab
        self.store = store
        self.view = RunView(lab.checkpoints, name)

    def launch(self, *overrides: str) -> None:
        """As a managed job."""
        words = ["jobs", "launch", "--yes", "--detach-run", "--name", self.name]
        self.lab.sky.run(*words, *self.words(*overrides))

    def words(self, *overrides: str) -> list[str]:
        """The task as it is shipped, on the laboratory's cluster, with a recipe that takes seconds."""
        envs = {"RECIPE": DPO, "OVERRIDES": " ".join((*TINY, *SMALLEST, *overrides)), "RUN": self.name}
        envs |= {"CHECKPOINTS": self.lab.checkpoints, **self.lab.trainer}
        secrets = {**self.lab.secrets, "AWS_ENDPOINT_URL": self.store.url}
        words = ["--infra", "slurm", "--gpus", "A100:8", str(ROOT / "jobs" / "dpo_full.yaml")]
        for kind, values in (("--env", envs), ("--secret", secrets)):
            words += [word for name, value in values.items() for word in (kind, f"{name}={value}")]
        return words

    def wait_for(self, *statuses: str, timeout_s: float = 600.0) -> str:
        return self.lab.sky.wait_for(self.name, *statuses, timeout_s=timeout_s)

    def step(self) -> int:
        """The last step that the worker has told on the node: sooner there than in the bucket."""
        told = self._newest("steps.jsonl")
        lines = told.read_text().splitlines()[:-1] if told else []
        return max((event["step"] for event in map(json.loads, lines) if event["kind"] == "step"), default=0)

    def staging(self, *, attempt: int) -> Path:
        """Where that attempt stages on the node, once it does."""
        folder = f"aeolus-*/{self.name}-*/attempt-{attempt:04d}"

        def found() -> Path | None:
            # On the node it may be a link into /dev/shm, which leads nowhere from here.
            links = [path / "staging" for path in self.lab.node_tmp.glob(folder)]
            return next((link for link in links if link.is_symlink() or link.exists()), None)

        link: Path = wait_until(found, f"attempt {attempt} to stage", timeout_s=ARRIVES_S, poll_s=0.2)
        return Path(f"{self.lab.node_root}{link.readlink()}") if link.is_symlink() else link

    def _newest(self, name: str) -> Path | None:
        found = self.lab.node_tmp.glob(f"aeolus-*/{self.name}-*/attempt-*/{name}")
        return max(found, default=None)

    def lose_machine(self) -> None:
        """SIGKILL to every process of the node, without warning, and the node is gone."""
        job = next(job for job, name in self.lab.slurm.jobs().items() if name.startswith(self.name))
        for process in psutil.process_iter():
            if _of_slurm_job(process, job):
                process.send_signal(signal.SIGKILL)
        self.lab.slurm.cancel(job)


def _of_slurm_job(process: psutil.Process, job: str) -> bool:
    try:
        return process.environ().get("SLURM_JOB_ID") == job
    except psutil.Error:
        return False


@contextmanager
def reached(lab: Lab) -> Iterator[None]:
    """This process has the laboratory's bucket and no other credentials."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(lab.secrets)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

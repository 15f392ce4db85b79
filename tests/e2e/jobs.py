"""A shipped task launched on the laboratory's cluster, and its run watched in the bucket and on the node."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import psutil

from tests.e2e.lab.lab import Lab
from tests.e2e.lab.launcher import Launcher
from tests.harness import ROOT, RunView, run_in_slices, wait_until
from tests.servers.s3 import FaultyS3

SAVE_STEPS = 20
LAST_STEP = 80
SHORT = (f"max_steps={LAST_STEP}", f"save_steps={SAVE_STEPS}", "eval_strategy=no", "logging_steps=1")
ENDLESS = ("max_steps=100000", "save_steps=50000", "eval_strategy=no", "logging_steps=1")
"""However long SkyPilot takes to end it."""
FEW = ("max_train_samples=60", "global_batch_size=8", "micro_batch_size=8")
SMALLEST = (
    "tiny.hidden_size=64",
    "tiny.intermediate_size=128",
    "tiny.num_hidden_layers=2",
    "tiny.vocab_size=600",
)
DPO = "zephyr-tiny/dpo"
TASK = ROOT / "jobs" / "dpo_full.yaml"
ARRIVES_S = 900.0
"""Seconds in which a submitted job has to be where it is waited for; on two idle cores it takes some 60."""


class Job:
    """One job of SkyPilot's, whose name is also its run's."""

    def __init__(self, lab: Lab, name: str, store: FaultyS3) -> None:
        self.name = name
        self.lab = lab
        self.store = store
        self.view = RunView(lab.checkpoints, name)
        self._access = {**lab.secrets, "AWS_ENDPOINT_URL": store.url}
        node = {"AEOLUS_NODE_PYTHON": lab.trainer["AEOLUS_TRAINER_PYTHON"]}
        self.launcher = Launcher(lab.inside, lab.node_tmp.parent / f"state-{name}", {**self._access, **node})

    def submit(self, *words: str, managed: bool = True) -> str:
        """By the launcher, as a managed job or on a cluster of its own; what it said."""
        place = ["--gpus", "A100:8", "--infra", "slurm", "--checkpoints", self.lab.checkpoints]
        place += ["--managed"] * managed
        done = self.launcher.run("submit", DPO, *place, "--name", self.name, *FEW, *SMALLEST, *words)
        return done.stdout + done.stderr

    def launch(self, *overrides: str) -> None:
        """As a managed job, by SkyPilot's own command."""
        words = ("jobs", "launch", "--yes", "--detach-run", "--name", self.name)
        self.lab.sky.run(*words, *self.words(*overrides))

    def words(self, *overrides: str) -> list[str]:
        """The task as it is shipped, on the laboratory's cluster, with a recipe that takes seconds."""
        envs = {"RECIPE": DPO, "OVERRIDES": " ".join((*FEW, *SMALLEST, *overrides)), "RUN": self.name}
        return ["--infra", "slurm", "--gpus", "A100:8", *self.given(envs), str(TASK)]

    def given(self, envs: dict[str, str]) -> list[str]:
        """Variables and secrets, as `sky` takes them."""
        envs = {**envs, "CHECKPOINTS": self.lab.checkpoints, **self.lab.trainer}
        values = [("--env", envs), ("--secret", self._access)]
        return [
            word
            for kind, pairs in values
            for name, value in pairs.items()
            for word in (kind, f"{name}={value}")
        ]

    def wait_for(self, *statuses: str, timeout_s: float = ARRIVES_S) -> str:
        return self.lab.sky.wait_for(self.name, *statuses, timeout_s=timeout_s)

    def step(self, *, attempt: int = 1) -> int:
        """Return the newest attempt's last step, if that attempt is `attempt` or later, else 0.

        The node has it sooner than the bucket.
        """
        files = self.lab.node_tmp.glob(f"aeolus-*/{self.name}-*/attempt-*/steps.jsonl")
        first = f"attempt-{attempt:04d}"
        told = max(
            (path for path in files if path.parent.name >= first),
            default=None,
            key=lambda path: path.parent.name,
        )
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

    def stand_beyond(self, commit: int, *, attempt: int) -> None:
        """Suspend the attempt beyond the step. Slurm's SIGTERM comes with a SIGCONT, which ends the pause."""
        run_in_slices(
            lambda: self._workers(attempt=attempt),
            lambda: self.step(attempt=attempt) > commit,
            f"{self.name} to be beyond step {commit}",
        )

    def go_on_at_leisure(self) -> None:
        """Train on with what the other tests leave of the cores.

        Training that is to be cancelled cannot stand still: SkyPilot's SIGTERM comes without a SIGCONT.
        """
        for worker in self._workers(attempt=1):
            worker.nice(19)
            worker.resume()

    def lose_machine(self) -> None:
        """SIGKILL to every process of the node, without warning, and the node is gone."""
        job = self.slurm_job()
        for process in self._processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.lab.slurm.cancel(job)

    def slurm_job(self) -> str:
        return next(job for job, name in self.lab.slurm.jobs().items() if name.startswith(self.name))

    def gone(self) -> bool:
        """Whether the cluster has nothing of it any more."""
        return not any(name.startswith(self.name) for name in self.lab.slurm.jobs().values())

    def _workers(self, *, attempt: int) -> list[psutil.Process]:
        """The attempt's processes that train; they are told where its folder is."""
        folder = f"*/{self.name}-*/attempt-{attempt:04d}/*"
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "trainer.worker" in (words := process.info["cmdline"] or ()) and fnmatch(words[-1], folder)
        ]

    def _processes(self) -> Iterator[psutil.Process]:
        job = self.slurm_job()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job:
                    yield process


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

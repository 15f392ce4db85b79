"""W&B and TensorBoard, if the recipe's `report_to` names them: one curve over all attempts, no step twice."""

from __future__ import annotations

import os
import re
from typing import Any

import xxhash
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs

from trainer.job import Job
from trainer.worker import checkpoint_identity

ONCE = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""Of one process' life; the Trainer logs them at its end."""


def prepare(trainer: Any, job: Job) -> None:
    """Put ours in place of Transformers' callbacks; before training."""
    start = checkpoint_identity.step(job.resume_from) if job.resume_from else 0
    if trainer.pop_callback(TensorBoardCallback):
        trainer.add_callback(_TensorBoard(job, start))
    if trainer.pop_callback(WandbCallback):
        os.environ.setdefault("WANDB_RUN_ID", run_id(job))
        os.environ.setdefault("WANDB_RESUME", "allow")
        os.environ.setdefault("WANDB_NAME", job.run_id)
        os.environ.setdefault("WANDB_DIR", str(job.reports))
        job.reports.mkdir(exist_ok=True)
        trainer.add_callback(_Wandb())


def run_id(job: Job) -> str:
    """The same at every attempt; another for a run of the same name elsewhere."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", job.run_id)[:40]
    return f"{name}-{xxhash.xxh3_64_hexdigest(f'{job.run_id} {job.report_id}'.encode())}"


class _TensorBoard(TensorBoardCallback):
    """Each attempt's file takes back what earlier ones tell of the steps that it takes again."""

    def __init__(self, job: Job, start: int) -> None:
        super().__init__()
        self._start = start
        self.logging_dir = str(job.reports / "tensorboard")

    def _init_summary_writer(self, _args: Any) -> None:
        purge_step = self._start + 1 if self._start else None
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=purge_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        told = {name: value for name, value in (logs or {}).items() if name not in ONCE}
        if told:
            super().on_log(args, state, control, logs=told, **more)


class _Wandb(WandbCallback):
    """W&B counts the calls to its `log`; told the step, it drops what it has already."""

    def on_log(
        self, args: Any, state: Any, _control: Any, model: Any = None, logs: Any = None, **_: Any
    ) -> None:
        told = {name: value for name, value in (logs or {}).items() if name not in ONCE}
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero and told:
            named = {**rewrite_logs(told), "train/global_step": state.global_step}
            self._wandb.log(named, step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_train_end(args, state, control, **more)
        if state.is_world_process_zero:
            self._wandb.finish()  # else its files lack their end when the attempt's folder is taken away

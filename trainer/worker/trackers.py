"""W&B and TensorBoard, if the recipe's `report_to` names them: one curve over all attempts, with each step once."""

from __future__ import annotations

import os
import re
from typing import Any

import xxhash
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs

from trainer.job import Job
from trainer.worker.checkpoint import identity

PER_PROCESS_TOTALS = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)
"""Metrics of one process, which the Trainer logs at its end. They are not sent to the trackers."""


def prepare(trainer: Any, job: Job) -> None:
    """Replace Transformers' callbacks for TensorBoard and W&B by ours; call this before `train()`."""
    start = identity.step(job.resume_from) if job.resume_from else 0
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
    """Return the W&B id: the same for every attempt, and different for a run of the same name in another bucket."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", job.run_id)[:40]
    return f"{name}-{xxhash.xxh3_64_hexdigest(f'{job.run_id} {job.report_id}'.encode())}"


class _TensorBoard(TensorBoardCallback):
    """Each attempt writes its own file. TensorBoard then hides the points that earlier files have for the steps of this attempt."""

    def __init__(self, job: Job, start: int) -> None:
        super().__init__()
        self._start = start
        self.logging_dir = str(job.reports / "tensorboard")

    def _init_summary_writer(self, _args: Any) -> None:
        purge_step = self._start + 1 if self._start else None
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=purge_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        metrics = {name: value for name, value in (logs or {}).items() if name not in PER_PROCESS_TOTALS}
        if metrics:
            super().on_log(args, state, control, logs=metrics, **more)


class _Wandb(WandbCallback):
    """W&B numbers the calls of `log`. With an explicit step it drops the steps that it has already."""

    def on_log(
        self, args: Any, state: Any, _control: Any, model: Any = None, logs: Any = None, **_: Any
    ) -> None:
        metrics = {name: value for name, value in (logs or {}).items() if name not in PER_PROCESS_TOTALS}
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero and metrics:
            named = {**rewrite_logs(metrics), "train/global_step": state.global_step}
            self._wandb.log(named, step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_train_end(args, state, control, **more)
        if state.is_world_process_zero:
            self._wandb.finish()  # otherwise its files are incomplete when the attempt's folder is removed

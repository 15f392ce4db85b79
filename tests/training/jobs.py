"""A tiny model's jobs, run in this process."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from trainer.events import MEASURED
from trainer.fit import fit
from trainer.hardware import Shape
from trainer.job import Job, Outcome
from trainer.recipe import load
from trainer.worker.__main__ import configure_logging, run
from trainer.worker.imports import train_function, uncollected
from trainer.worker.supervisor_channel import Channel

LAPTOP = Shape(accelerator=None, count=0, memory_gib=None, cores=1, host_memory_gib=8.0, node="test")
SMALL = (
    "tiny={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}",
    "max_train_samples=24",
    "max_test_samples=4",
    "global_batch_size=4",
    "micro_batch_size=2",
    "max_steps=4",
    "save_steps=2",
    "eval_strategy=no",
)
LORA = ("use_peft=true", "lora_r=4", "lora_dropout=0.1", "lora_target_modules=[q_proj, v_proj]")


def make_job(work: Path, name: str, *overrides: str, resume_from: Path | None = None) -> Job:
    """A job of a shipped recipe or a file, as the supervisor would write it."""
    recipe = load(name, overrides).recipe
    work.mkdir(parents=True)
    job = Job(
        run_id="test",
        attempt=1,
        recipe=recipe,
        fit=fit(recipe, LAPTOP, None),
        work=work,
        model=recipe.model_name_or_path,
        resume_from=resume_from,
    )
    job.staging.mkdir()
    return job


class Trained:
    """A job that was run, and what it said."""

    def __init__(self, job: Job, outcome: Outcome) -> None:
        self.job = job
        self.outcome = outcome
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in job.steps.read_text().splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def trajectory(self) -> list[dict[str, Any]]:
        """What each step did, without how long it took here."""
        return [{key: line[key] for key in line.keys() - MEASURED} for line in self.of("step")]

    def checkpoint(self, step: int) -> Path:
        return self.job.staging / f"checkpoint-{step}"

    @property
    def final(self) -> Path:
        return self.job.staging / "final"


def without_test_data(job: Job) -> Job:
    mixture = job.recipe.dataset_mixture.model_copy(update={"test_datasets": ()})
    return job.model_copy(update={"recipe": job.recipe.model_copy(update={"dataset_mixture": mixture})})


@functools.cache
def import_stack(method: str) -> None:
    """As a worker does, so that the collector passes over it here too."""
    with uncollected():
        train_function(method)


def train(job: Job, channel: Channel | None = None) -> Trained:
    channel = channel or Channel(job)
    configure_logging(channel)
    import_stack(job.recipe.method)
    outcome = run(job, channel)
    channel.conclude(outcome)
    return Trained(job, outcome)

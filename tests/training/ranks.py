"""Jobs of several processes on the CPU, started as the supervisor starts them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training import forks
from tests.training.jobs import Trained, make_job
from trainer.job import Job, Outcome
from trainer.supervisor.workers import Workers

SIZES = (
    "tiny={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}",
    "max_train_samples=38",  # 4 global batches of 8 to an epoch, and 6 rows that wait
    "max_test_samples=4",
    "global_batch_size=8",
    "micro_batch_size=4",
    "max_steps=6",
    "save_steps=3",
    "eval_strategy=no",
    "learning_rate=5.0e-3",
)
SLOW_S = 480.0
"""Seconds for a start with its imports, and for DeepSpeed to compile, on a core that others use too."""


def ranks_job(work: Path, name: str, *overrides: str, resume_from: Path | None = None, **fit: Any) -> Job:
    """A job with another fit than a machine without GPUs would have."""
    job = make_job(work, name, *SIZES, *overrides, resume_from=resume_from)
    processes = fit.get("processes", 1)
    fit = {"engine": "single" if processes == 1 else "ddp", "micro_batch": 4, **fit}
    fit["accumulation"] = job.recipe.global_batch_size // (processes * fit["micro_batch"])
    return job.model_copy(
        update={"fit": type(job.fit).model_validate({**job.fit.model_dump(), "threads": 1, **fit})}
    )


def start(job: Job) -> Workers:
    """Ranks that import for themselves, to be killed or told to stop."""
    return Workers(job, sys.executable)


def finish(workers: Workers, timeout_s: float = SLOW_S) -> int:
    deadline = time.monotonic() + timeout_s
    try:
        while (code := workers.poll()) is None:
            assert time.monotonic() < deadline, f"the ranks did not end in {timeout_s:.0f} s"
            workers.wait(0.1)
    finally:
        workers.kill()
    return code


def told(job: Job) -> list[dict[str, Any]]:
    text = job.steps.read_text() if job.steps.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run(job: Job) -> Trained:
    """By ranks that are forks of a warm process."""
    return _trained(job, forks.workers(job))


def run_started(job: Job) -> Trained:
    """By ranks that import for themselves, as a user's do."""
    return _trained(job, start(job))


def _trained(job: Job, workers: Workers) -> Trained:
    code = finish(workers)
    outcome = Outcome.model_validate_json(job.outcome.read_text()) if job.outcome.exists() else None
    assert outcome is not None, f"the ranks ended with {code} and left no outcome: {told(job)[-3:]}"
    return Trained(job, outcome)


def wait_for_step(job: Job, workers: Workers, step: int) -> None:
    wait_for(job, workers, lambda line: line["kind"] == "step" and line["step"] >= step)


def wait_for(job: Job, workers: Workers, wanted: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + SLOW_S
    while not any(map(wanted, told(job))):
        assert workers.poll() is None, "the ranks ended before their time"
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""The worker, of which rank 1 is told to stop within its first evaluation: `python -m tests.training.noticed_rank JOB_JSON`."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from trainer.worker import __main__ as worker


def notice_within(patch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM to this process once an evaluation's first batch is computed; how many batches each evaluation had then."""
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    took, loop, batches = CallbackHandler.on_prediction_step, Trainer.evaluation_loop, []

    def on_prediction_step(self: Any, *arguments: Any, **named: Any) -> Any:
        batches[-1] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return took(self, *arguments, **named)

    def evaluation_loop(self: Any, *arguments: Any, **named: Any) -> Any:
        batches.append(0)
        return loop(self, *arguments, **named)

    patch.setattr(CallbackHandler, "on_prediction_step", on_prediction_step)
    patch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    return batches


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        notice_within(pytest.MonkeyPatch())
    worker.main()

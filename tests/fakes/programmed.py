"""`python -m trainer` with another training program: the module that $PROGRAM names.

    PROGRAM=tests.training.held_rank python -m tests.fakes.programmed run RECIPE ...

Everything else is real.
"""

from __future__ import annotations

import os
from typing import Any

from trainer import __main__ as command
from trainer.job import Job
from trainer.supervisor import attempt
from trainer.supervisor.workers import Workers


def programmed(job: Job, python: str, _program: str, **more: Any) -> Workers:
    """Start the workers that $PROGRAM names."""
    return Workers(job, python, os.environ["PROGRAM"], **more)


if __name__ == "__main__":
    attempt.Workers = programmed  # type: ignore[misc, assignment]
    command.main()

"""`python -m trainer` with a fit that assumes GPUs: the fields in $SHAPED replace those of the real fit.

    SHAPED='{"processes": 2, "engine": "zero3"}' python -m tests.fakes.shaped run RECIPE ...

Everything else is real. The ranks train on the CPU of this machine.
"""

from __future__ import annotations

import json
import os
from typing import Any

from trainer import __main__ as command
from trainer.fit import Fit
from trainer.supervisor import run


def shaped(real: Any) -> Any:
    """Return a function that makes the real decision and replaces the fields that are in $SHAPED."""
    wanted = json.loads(os.environ["SHAPED"])

    def fit(*arguments: Any) -> Fit:
        decided: Fit = real(*arguments)
        accumulation = (
            decided.micro_batch * decided.accumulation // (wanted["processes"] * decided.micro_batch)
        )
        return Fit.model_validate({**decided.model_dump(), "accumulation": accumulation, **wanted})

    return fit


if __name__ == "__main__":
    run.fit = shaped(run.fit)  # a laptop has no two GPUs
    command.main()

"""`python -m trainer` on a machine that has GPUs as far as the fit is concerned: $SHAPED is what it decides.

    SHAPED='{"processes": 2, "engine": "zero3"}' python -m tests.fakes.shaped run RECIPE ...

Everything else is the real thing: the ranks train on this machine's CPU.
"""

from __future__ import annotations

import json
import os
from typing import Any

from trainer import __main__ as command
from trainer.fit import Fit
from trainer.supervisor import run


def shaped(real: Any) -> Any:
    """The real decision, with what $SHAPED says in place of its own."""
    wanted = json.loads(os.environ["SHAPED"])

    def fit(*arguments: Any) -> Fit:
        decided: Fit = real(*arguments)
        accumulation = (
            decided.micro_batch * decided.accumulation // (wanted["processes"] * decided.micro_batch)
        )
        return Fit.model_validate({**decided.model_dump(), "accumulation": accumulation, **wanted})

    return fit


if __name__ == "__main__":
    run.fit = shaped(run.fit)  # a laptop has no shape of two GPUs to offer
    command.main()

"""`python -m trainer run` with the fake worker, as a process that a test can stop, continue and kill.

    python -m tests.fakes.supervisor CHECKPOINTS RUN_ID WORK

The exit codes are the real ones. $FAKE_WORKER selects how the worker fails.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.recipe import Recipe
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import Notice
from trainer.supervisor.run import run

RECIPE = {
    "name": "fake",
    "method": "sft",
    "init": "tiny",
    "dataset_mixture": {"datasets": [{"id": "generated:chats"}]},
    "global_batch_size": 4,
}

if __name__ == "__main__":
    checkpoints, run_id, work = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    notice = Notice()
    notice.handle_signals()
    request = RunRequest(
        recipe=Recipe.model_validate(RECIPE),
        checkpoints=checkpoints,
        run_id=run_id,
        program="tests.fakes.worker",
        work=Path(work),
    )
    try:
        code = run(request, notice)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    sys.exit(code)

"""`python -m trainer run` with a training program that needs no torch: same options, same supervisor."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from trainer.accounting import Limits
from trainer.errors import UserError
from trainer.options import BUDGET_USD, DEADLINE_H
from trainer.recipe import load
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import Notice
from trainer.supervisor.run import run
from trainer.supervisor.team import read_position

PROGRAM = "tests.fakes.counting"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("recipe")
    for name in ("--checkpoints", "--run-id", "--work"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    os.environ["AEOLUS_TRAINER_PYTHON"] = sys.executable
    notice = Notice()
    notice.handle_signals()
    loaded = load(given.recipe, ())
    work = Path(given.work) / given.run_id
    request = RunRequest(
        recipe=loaded.recipe,
        checkpoints=given.checkpoints,
        run_id=given.run_id,
        program=PROGRAM,
        work=work,
        tmpfs=work.parent / "tmpfs",
        limits=Limits.model_validate(
            {"budget_usd": os.environ.get(BUDGET_USD), "deadline_h": os.environ.get(DEADLINE_H)}
        ),
    )
    try:
        return run(request, notice, read_position(os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 (as `python -m trainer` says it)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

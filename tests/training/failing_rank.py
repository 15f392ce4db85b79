"""The worker, of which rank 1 fails after its second step: `python -m tests.training.failing_rank JOB_JSON`."""

from __future__ import annotations

import os
from typing import Any

from trainer.worker import __main__ as worker


def fail(*_: Any, **__: Any) -> None:
    from trainer.worker import callback

    took = callback.Progress.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == 2:
            raise RuntimeError("rank 1 was told to fail")
        return took(self, args, state, control, **rest)

    callback.Progress.on_step_end = on_step_end  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        fail()
    worker.main()

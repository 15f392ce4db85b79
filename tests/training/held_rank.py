"""The worker, which stops for ever in the middle of a save: `HELD_IN=copy python -m tests.training.held_rank JOB_JSON`.

It stops in the save of step 8. With `copy` it has overwritten half of the tensors of the save before. With `text` it has
written half of the first JSON file. Then it creates the file `held` in its work folder.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from trainer.job import Job
from trainer.worker import __main__ as worker

HELD_AT = 8
HELD_FILE = "held"


def wait_for_ever() -> None:
    work = Job.model_validate_json(Path(sys.argv[1]).read_text()).work
    (work / HELD_FILE).touch()
    while True:
        time.sleep(60)


def hold_in_copy() -> None:
    from trainer.worker.checkpoint.buffers import Buffer

    copy = Buffer.copy

    def half(buffer: Any, tensors: dict[str, Any]) -> None:
        copy(buffer, dict(list(tensors.items())[: len(tensors) // 2]))
        wait_for_ever()

    Buffer.copy = half  # type: ignore[method-assign, assignment]


def hold_in_text() -> None:
    from trainer.worker.checkpoint import save

    def half(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.partial").write_text(text[: len(text) // 2])
        wait_for_ever()

    save.write_atomically = half


HOLDS = {"copy": hold_in_copy, "text": hold_in_text}


def hold() -> None:
    """Change the worker's save of step 8, and let it wait for the upload before, so that it uses the same memory."""
    from trainer.worker.checkpoint.save import CheckpointWriter

    write = CheckpointWriter.write

    def held(writer: Any, folder: Path) -> None:
        if folder.name == f"checkpoint-{HELD_AT}":
            while not all(buffer.is_free() for buffer in writer._buffers._buffers):
                time.sleep(0.05)
            HOLDS[os.environ["HELD_IN"]]()
        write(writer, folder)

    CheckpointWriter.write = held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold()
    worker.main()

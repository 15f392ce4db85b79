"""Compile what DeepSpeed needs on the CPU: `python -m tests.training.compile`.

A fresh environment compiles for minutes. `make test` does so while the unit tests run, so that no test waits for it.
"""

from __future__ import annotations

import os
import shutil

from trainer.recipe import load


def main() -> None:
    """Compile the host communication and the host Adam, or do nothing without a compiler."""
    if shutil.which("g++") is None:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    from trainer.worker.engine import compile_host_adam, compile_host_communication

    compile_host_communication()
    compile_host_adam(load("zephyr-tiny/dpo").recipe)


if __name__ == "__main__":
    main()

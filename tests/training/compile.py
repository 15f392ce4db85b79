"""Compile what DeepSpeed needs on the CPU: `python -m tests.training.compile`.

A fresh environment compiles for minutes. `make test` does so while the unit tests run, so that no test waits for it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from trainer.recipe import load

COMPILER = "c++"
"""As torch calls it."""
WITHOUT_SYMBOLS = '#!/bin/sh\nexec {compiler} "$@" -g0\n'


def main() -> None:
    """Compile the host communication and the host Adam, or do nothing without a compiler."""
    compiler = shutil.which(COMPILER)
    if compiler is None:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    from trainer.worker.engine import compile_host_adam, compile_host_communication

    with tempfile.TemporaryDirectory() as folder:
        # DeepSpeed asks for debug symbols, which take half of the compiler's time and change no instruction. ninja
        # compares command lines, so what is compiled by this name is not compiled again without this folder.
        script = Path(folder) / COMPILER
        script.write_text(WITHOUT_SYMBOLS.format(compiler=compiler))
        script.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        compile_host_communication()
        compile_host_adam(load("zephyr-tiny/dpo").recipe)


if __name__ == "__main__":
    main()

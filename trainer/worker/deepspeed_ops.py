"""DeepSpeed's code for the host: compiled once for each machine, whatever became of those that compiled before.

Torch marks a compilation with a file. A process that is killed meanwhile leaves it behind, and every later one on the
machine would wait for ever (`torch.utils.file_baton`): so ours take turns by a lock that ends with its holder, and
whoever has the turn after one that was killed takes such a file away. Nobody else's: another program may be compiling.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.recipe import Recipe


def compile_host_adam(recipe: Recipe) -> None:
    """The compiled code stays in $TORCH_EXTENSIONS_DIR. The ranks wait for the first of them.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    from deepspeed.ops.op_builder.cpu import CPUAdagradBuilder, CPUAdamBuilder

    builder = CPUAdagradBuilder() if recipe.trainer_args.get("optim") == "adagrad" else CPUAdamBuilder()
    try:
        _load(builder)
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"DeepSpeed's {builder.NAME}, which steps an offloaded optimizer, cannot be compiled here: "
            f"{str(error).strip().splitlines()[-1]}",
            hint="install g++ and ninja, or train without offload: `offload: none`",
        ) from error


def compile_host_communication() -> None:
    """What DeepSpeed wants of ranks on the CPU."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    _load(ShareMemCommBuilder())


def _load(builder: Any) -> None:
    beside_python = str(Path(sys.executable).parent)  # ninja may lie there only
    if beside_python not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + beside_python
    with _turn(builder.name):
        builder.load()


@contextmanager
def _turn(name: str) -> Iterator[None]:
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    with (folder / "aeolus.lock").open("a+") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        ours.seek(0)
        if ours.read():
            (folder / "lock").unlink(missing_ok=True)
        else:
            ours.write("mine until this is cleared")
            ours.flush()
        try:
            yield
        finally:
            ours.truncate(0)

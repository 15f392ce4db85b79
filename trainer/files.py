"""Atomic writes, for the launcher and the trainer: a reader sees the old file or the whole new one, never a part.

This module stands alone, because the launcher must not import `trainer.staged` or `trainer.job`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write the text to a temporary file beside `path`, then rename it to `path`.

    The temporary name is unique to the process and thread, so concurrent writers do not mix their bytes.
    A failed write removes the temporary file and leaves the old file as it was.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

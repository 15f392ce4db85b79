"""Staged checkpoints: complete folders on the local disk or in memory that wait for upload."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trainer.files import write_atomically

STAGED_SUFFIX = ".staged"
IDENTITY_FILE = "aeolus.json"
"""The file of a checkpoint that identifies its model, data and package versions."""
BUFFERS_FOLDER = "buffers"
"""The folder in staging with the memory that saves reuse. Its files are linked into the folders of checkpoints."""
TRAINER_STATE_FILE = "trainer_state.json"
"""The file of a checkpoint with Transformers' counters, such as the step."""
CHECKPOINT_FORMAT = 2
"""The format of the checkpoints that this release writes; it reads all formats up to this one. 1: the files of each
engine's library. 2: see `trainer.worker.checkpoint`."""


class Staged(BaseModel):
    """The marker beside a complete folder in staging. It is written last and atomically."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Name of the folder beside the marker."""
    step: int
    format: int = 1
    """Format of a checkpoint's files, see `CHECKPOINT_FORMAT`; a model and a reference have only format 1."""
    kind: Literal["checkpoint", "final", "reference"] = "checkpoint"
    """`reference`: log-probabilities of DPO's reference, which outlive the run. A later one replaces an earlier one."""
    stall_s: float = 0.0
    """Seconds that training stood still while the folder was written."""
    details: dict[str, Any] = {}
    """Facts for the manifest: world size, engine, data digest."""


def mark_staged(staging: Path, staged: Staged) -> None:
    """Mark a folder in staging as complete."""
    write_atomically(staging / f"{staged.folder}{STAGED_SUFFIX}", staged.model_dump_json())


def pending(staging: Path) -> list[Staged]:
    """Return the markers of complete folders that wait for upload or are being uploaded, by step."""
    found = []
    for path in staging.glob(f"*{STAGED_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # uploaded and removed since the listing
            found.append(Staged.model_validate_json(path.read_text()))
    return sorted(found, key=lambda staged: (staged.step, staged.kind == "final", staged.folder))

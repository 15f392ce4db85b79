"""Staged checkpoints: complete folders on the local disk that wait for their upload."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trainer.files import write_atomically

STAGED_SUFFIX = ".staged"
IDENTITY_FILE = "aeolus.json"
"""The file of a checkpoint that tells which model, data and packages it belongs to."""


class Staged(BaseModel):
    """The marker beside a complete folder in staging; written last, by rename."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Name of the folder beside the marker."""
    step: int
    kind: Literal["checkpoint", "final", "reference"] = "checkpoint"
    """`reference`: log-probabilities of DPO's reference, which outlive the run; a later one replaces an earlier."""
    stall_s: float = 0.0
    """Seconds that training stood still while the folder was written."""
    details: dict[str, Any] = {}
    """What the manifest keeps beside the files: world size, engine, data digest."""


def mark_staged(staging: Path, staged: Staged) -> None:
    write_atomically(staging / f"{staged.folder}{STAGED_SUFFIX}", staged.model_dump_json())


def pending(staging: Path) -> list[Staged]:
    """Complete folders that wait for upload or are being uploaded, by step."""
    found = []
    for path in staging.glob(f"*{STAGED_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # uploaded, and removed since we looked
            found.append(Staged.model_validate_json(path.read_text()))
    return sorted(found, key=lambda staged: (staged.step, staged.kind == "final", staged.folder))

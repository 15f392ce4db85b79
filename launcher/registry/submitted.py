"""What was submitted from this machine to SkyPilot: one small file each, so that `status` knows where to look."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.cloud.protocol import Kind
from trainer.files import write_atomically

FOLDER = "submitted"


class Sent(BaseModel):
    """A submission. Holds no overrides and no environment: either may carry a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    recipe: str
    checkpoints: str
    """Canonical address of the folder of runs."""
    kind: Kind
    name: str
    """SkyPilot's, of the managed job or of the cluster."""
    job_id: int | None
    """None until SkyPilot has answered."""
    where: str
    """What was chosen: `A100-80GB:8 spot on gcp`; SkyPilot may have had to take its next choice."""
    usd_per_h: float | None
    """Of what was chosen; None where machines are not rented."""
    submitted: float
    """Unix time, seconds."""
    over: bool = False
    """Whether SkyPilot has been seen to have nothing of it any more, so that nobody needs to ask again."""
    options: dict[str, Any] = {}
    """Where it was asked for: GPUs, clouds, market."""
    mounts: dict[str, str] = {}
    """What was copied to its nodes: path there, path here."""


def remember(state: Path, sent: Sent) -> None:
    """Write it down, in place of an earlier submission of the same run; before the launch, so that none is lost."""
    path = _path(state, sent.run_id, sent.checkpoints)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, sent.model_dump_json())


def recall(state: Path, run_id: str, checkpoints: str) -> Sent | None:
    """The newest submission of a run."""
    return _read(_path(state, run_id, checkpoints))


def forget(state: Path, sent: Sent) -> None:
    """It was never launched."""
    _path(state, sent.run_id, sent.checkpoints).unlink(missing_ok=True)


def known(state: Path) -> list[Sent]:
    """All that was submitted from this machine, the latest first."""
    found = [_read(path) for path in (state / FOLDER).glob("*.json")]
    return sorted((sent for sent in found if sent), key=lambda sent: sent.submitted, reverse=True)


def _path(state: Path, run_id: str, checkpoints: str) -> Path:
    digest = hashlib.sha256(checkpoints.encode()).hexdigest()[:8]
    return state / FOLDER / f"{run_id}-{digest}.json"


def _read(path: Path) -> Sent | None:
    try:
        return Sent.model_validate_json(path.read_text())
    except (FileNotFoundError, ValidationError):  # the latter: another version's
        return None

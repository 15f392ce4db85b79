"""Records of the runs that this machine has submitted to SkyPilot: one small file for each run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.cloud.protocol import Kind
from trainer.files import write_atomically

FOLDER = "submitted"


class StartedRun(BaseModel):
    """A run that was started from here. It holds no overrides and no environment: either may contain a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    recipe: str
    checkpoints: str
    """Canonical address of the folder of runs."""
    kind: Kind
    name: str
    """The backend's name of the managed job, the cluster or the local job."""
    job_id: int | None
    """None until SkyPilot has answered."""
    where: str
    """The planned place, such as `A100-80GB:8 spot on gcp`. SkyPilot may have used its next choice instead."""
    usd_per_h: float | None
    """Price of the planned place; None for machines that are not rented."""
    submitted: float
    """Unix time, seconds."""
    over: bool = False
    """Whether SkyPilot no longer has the job, so that `status` need not ask again."""
    options: dict[str, Any] = {}
    """The options that choose the place (GPUs, clouds, market), for `--resume`."""
    mounts: dict[str, str] = {}
    """Files that were copied to the nodes: path on the node, path here."""


def remember(state: Path, record: StartedRun) -> None:
    """Write the record in place of an earlier one of the same run.

    It is written before the launch, so that no launched job is forgotten. A local job needs none: it has a pid file.
    """
    if record.kind == "local":
        return
    path = _path(state, record.run_id, record.checkpoints)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, record.model_dump_json())


def recall(state: Path, run_id: str, checkpoints: str) -> StartedRun | None:
    """Return the newest submission of a run."""
    return _read(_path(state, run_id, checkpoints))


def forget(state: Path, record: StartedRun) -> None:
    """Remove the record of a job that was never launched."""
    if record.kind != "local":
        _path(state, record.run_id, record.checkpoints).unlink(missing_ok=True)


def submissions(state: Path) -> list[StartedRun]:
    """Return everything that was submitted from this machine, the latest first."""
    found = [_read(path) for path in (state / FOLDER).glob("*.json")]
    return sorted((record for record in found if record), key=lambda record: record.submitted, reverse=True)


def _path(state: Path, run_id: str, checkpoints: str) -> Path:
    digest = hashlib.sha256(checkpoints.encode()).hexdigest()[:8]
    return state / FOLDER / f"{run_id}-{digest}.json"


def _read(path: Path) -> StartedRun | None:
    try:
        return StartedRun.model_validate_json(path.read_text())
    except (FileNotFoundError, ValidationError):  # the latter: written by another version
        return None

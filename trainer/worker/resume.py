"""What a checkpoint must have, and be of, before a run goes on from it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trainer.errors import DataError, ModelError, UserError
from trainer.job import Job, write_atomically
from trainer.worker.data import Tokens

log = logging.getLogger(__name__)
FILE = "aeolus.json"


class Identity(BaseModel):
    """What a trajectory depends on besides the recipe; kept in every checkpoint and its manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    """Fingerprint of the training tokens."""
    tokens: int
    model: str
    """Digest of the weights that the run began with."""
    engine: str = "single"
    world_size: int
    micro_batch: int
    accumulation: int
    threads: int


def identity(job: Job, tokens: Tokens, model: str) -> Identity:
    return Identity(
        data=tokens.fingerprint,
        tokens=tokens.tokens,
        model=model,
        world_size=job.fit.processes,
        micro_batch=job.fit.micro_batch,
        accumulation=job.fit.accumulation,
        threads=job.fit.threads,
    )


def write(folder: Path, mine: Identity) -> None:
    write_atomically(folder / FILE, mine.model_dump_json(indent=2))


def check(folder: Path, mine: Identity) -> None:
    """Refuse a checkpoint that Transformers would resume from in silence, with another run's state or with none.

    Raises:
        UserError: a file is missing.
        DataError: the training data are not those that the run began with.
        ModelError: the base model is not the one that the run began with.
    """
    rng = "rng_state.pth" if mine.world_size == 1 else "rng_state_0.pth"
    for name in (FILE, "optimizer.pt", "scheduler.pt", "trainer_state.json", rng):
        if not (folder / name).is_file():
            raise UserError(
                f"the checkpoint {folder.name} has no {name}",
                hint="remove its commit from the bucket: the run goes on from the one before",
            )
    theirs = Identity.model_validate_json((folder / FILE).read_text())
    if theirs.data != mine.data:
        raise DataError(
            f"the training data changed: {theirs.tokens} tokens ({theirs.data}) when the run began, "
            f"{mine.tokens} ({mine.data}) now",
            hint="bring the old data back (name a `revision` for a data set of the Hub), or start another run",
        )
    if theirs.model != mine.model:
        raise ModelError(
            f"the base model changed: {theirs.model} when the run began, {mine.model} now",
            hint="bring the old model back (name a `model_revision` for a model of the Hub), or start another run",
        )
    _say_inexact(theirs, mine)


def _say_inexact(theirs: Identity, mine: Identity) -> None:
    for name in ("world_size", "micro_batch", "accumulation", "threads"):
        before, now = getattr(theirs, name), getattr(mine, name)
        if before != now:
            log.warning("%s was %s and is %s: the run goes on, but not bit for bit", name, before, now)


def at_last_step(folder: Path) -> bool:
    """Whether the checkpoint's run only lacked its export."""
    state = _state(folder)
    return bool(state["global_step"] >= state["max_steps"] > 0)


def step(folder: Path) -> int:
    return int(_state(folder)["global_step"])


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return state

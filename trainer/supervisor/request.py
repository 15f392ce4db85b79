"""What `python -m trainer run` was asked for."""

from __future__ import annotations

from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

from trainer.recipe import Recipe
from trainer.spent import Limits
from trainer.supervisor.staging import TMPFS, Wanted
from trainer.supervisor.workers import PROGRAM


class Request(BaseModel):
    """A run, where it is kept, and what it may take."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    notes: tuple[str, ...] = ()
    checkpoints: str
    """URI of the folder of runs: gs://, s3:// or a path."""
    run_id: str
    program: str = PROGRAM
    work: Path
    """Folder of this machine for the run's attempts: staging, restored checkpoints."""
    staging: Wanted = "auto"
    tmpfs: Path = TMPFS
    """Where memory can be written to as files."""
    limits: Limits = Limits()

    def digest(self) -> str:
        """Of what all nodes of a run must agree on."""
        words = f"{self.checkpoints}\n{self.run_id}\n{self.recipe.digest()}"
        return xxhash.xxh3_128_hexdigest(words.encode())

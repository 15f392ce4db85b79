"""What the supervisor and its workers tell each other, as files in the attempt's work folder.

The supervisor knows nothing of the training program beyond this: it writes `job.json`, starts the
program with that path as its only argument, and watches the folder. Any program that reads the
job, writes checkpoint folders under `staging/` and drops a marker beside each can run under it.

    job.json                        what to do                          supervisor -> worker
    steps.jsonl                     what happens, a JSON object a line  worker -> supervisor
    staging/checkpoint-100/         a checkpoint being written          worker
    staging/checkpoint-100.staged   it is complete: upload it           worker -> supervisor
    outcome.json                    how it ended                        worker -> supervisor
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trainer.fit import Fit
from trainer.recipe import Recipe

STEPS = "steps.jsonl"


class Job(BaseModel):
    """One attempt at a run, as its workers see it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    attempt: int
    recipe: Recipe
    fit: Fit
    work: Path
    """The attempt's own folder; gone when the attempt ends."""
    model: str | None
    """Local folder, GGUF file or Hub id to load instead of the recipe's; None with `init: tiny`."""
    resume_from: Path | None
    """A restored checkpoint, already verified; None to start at step 0."""
    reference: Path | None = None
    """Folder with what the bucket keeps of the reference's log-probabilities, a folder each, the best first."""
    report_id: str = ""
    """Tells this run from others of its name, elsewhere or earlier."""

    @property
    def staging(self) -> Path:
        return self.work / "staging"

    @property
    def reports(self) -> Path:
        """What W&B and TensorBoard write; copied to the bucket."""
        return self.work / "reports"

    @property
    def steps(self) -> Path:
        return self.work / STEPS

    @property
    def outcome(self) -> Path:
        return self.work / "outcome.json"


class Publish(BaseModel):
    """A committed checkpoint, or the final model, to be made a model for others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: Job
    """Of the run; its base is found by it."""
    source: Path
    """Folder of the verified checkpoint or final model."""
    step: int
    merge: bool
    """An adapter into its base."""
    card: str
    """Text of README.md."""
    into: Path
    """Folder that appears when all is there."""
    push: str | None = None
    """Repository of the Hub to upload it to."""
    private: bool = False

    @property
    def outcome(self) -> Path:
        return self.job.outcome


class Outcome(BaseModel):
    """How the workers ended. An exit code is a number without a message, so the truth is in this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Literal["done", "preempted", "user_error", "no_room", "unavailable"]
    """`no_room`: the staging folder's disk or memory is full; another machine may do better. `unavailable`: the Hub does
    not answer or a GPU failed, which a later try or another machine may do without.
    """
    message: str = ""
    hint: str | None = None

    @property
    def explains(self) -> bool:
        """It says why a rank failed, which the codes of those that waited for it do not."""
        return self.status in ("user_error", "no_room", "unavailable")


class Tail:
    """The lines that were added to a file since the last look; a line in the making waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode().splitlines()

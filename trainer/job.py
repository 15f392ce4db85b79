"""The interface between the supervisor and its workers: files in the attempt's work folder.

The supervisor writes `job.json`, starts the training program with that path as its only argument, and watches the
folder. It knows nothing else about the program. Any program can run under it that reads the job, writes checkpoint
folders under `staging/`, and writes a marker beside each complete one.

    job.json                        what to do                          supervisor -> worker
    steps.jsonl                     events, one JSON object per line  worker -> supervisor
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
    """The attempt's own folder, which is deleted when the attempt ends."""
    model: str | None
    """Local folder, GGUF file or Hub id to load instead of the recipe's; None with `init: tiny`."""
    resume_from: Path | None
    """Folder of a restored and verified checkpoint; None to start at step 0."""
    reference: Path | None = None
    """Folder with cached log-probabilities of the reference, one subfolder per cache entry, the best first."""
    report_id: str = ""
    """Distinguishes this run in trackers from other runs with the same name, in other buckets or earlier."""

    @property
    def staging(self) -> Path:
        return self.work / "staging"

    @property
    def reports(self) -> Path:
        """Folder for the files of W&B and TensorBoard, which are copied to the bucket."""
        return self.work / "reports"

    @property
    def steps(self) -> Path:
        return self.work / STEPS

    @property
    def outcome(self) -> Path:
        return self.work / "outcome.json"


class Publish(BaseModel):
    """The task to export a committed checkpoint, or the final model, for publication."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: Job
    """A job of the run; it locates the base model."""
    source: Path
    """Folder of the verified checkpoint or final model."""
    step: int
    merge: bool
    """Whether to merge an adapter into its base model."""
    card: str
    """Text of README.md."""
    into: Path
    """Folder to create; it appears when it is complete."""
    push: str | None = None
    """Repository on the Hub to upload to."""
    private: bool = False

    @property
    def outcome(self) -> Path:
        return self.job.outcome


class Outcome(BaseModel):
    """How the workers ended. This file replaces their exit codes, which have no message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Literal["done", "preempted", "user_error", "no_room", "unavailable"]
    """`no_room`: the disk or memory of the staging folder is full, and another machine's may be larger. `unavailable`: the
    Hub does not answer or a GPU failed, and a later try or another machine may succeed.
    """
    message: str = ""
    hint: str | None = None

    @property
    def explains(self) -> bool:
        """Whether it names the cause of a failure. The exit codes of the other ranks, which only waited, do not."""
        return self.status in ("user_error", "no_room", "unavailable")


class Tail:
    """Reads the lines that were added to a file since the last call. An unfinished line is left for a later call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode().splitlines()

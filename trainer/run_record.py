"""The record of a run, `run.json`, which is written once; and the events of its earlier attempts."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from trainer.bucket import Bucket
from trainer.bucket.layout import RUN_KEY, events_key
from trainer.errors import RecipeError
from trainer.events import Event, of_kind, parse
from trainer.recipe import Recipe
from trainer.release import own_version


class RunRecord(BaseModel):
    """The run's identity. Every attempt must have the same recipe."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    created: datetime
    recipe: Recipe
    recipe_digest: str
    notes: tuple[str, ...]
    versions: dict[str, str]


def write_or_compare(bucket: Bucket, run_id: str, recipe: Recipe, notes: tuple[str, ...]) -> None:
    """Write `run.json`, or check that the existing one has the same recipe.

    Raises:
        RecipeError: the run was started with another recipe; the message names the differences.
    """
    mine = RunRecord(
        run_id=run_id,
        created=datetime.now(UTC),
        recipe=recipe,
        recipe_digest=recipe.digest(),
        notes=notes,
        versions={"aeolus": own_version(), "python": platform.python_version()},
    )
    if bucket.create(RUN_KEY, mine.model_dump_json(indent=2).encode()):
        return
    theirs = RunRecord.model_validate_json(bucket.get(RUN_KEY))
    if theirs.recipe_digest == mine.recipe_digest:
        return
    raise RecipeError(
        f"run {run_id} was started with another recipe: {'; '.join(theirs.recipe.differences(recipe))}",
        hint="choose another run id, or use the recipe that the run was started with",
    )


def read(bucket: Bucket) -> RunRecord:
    """Return the record of the run.

    Raises:
        FileNotFoundError: no attempt has started the run.
    """
    return RunRecord.model_validate_json(bucket.get(RUN_KEY))


def report_id(bucket: Bucket) -> str:
    """Return an id by which trackers distinguish this run from others with the same name."""
    return f"{bucket.uri} {read(bucket).created.isoformat()}"


def fruitless_attempts(bucket: Bucket, attempt: int) -> int:
    """Return how many consecutive attempts just before `attempt` failed without committing a checkpoint."""
    count = 0
    for number in range(attempt - 1, 0, -1):
        events = _read_events(bucket, number)
        if not of_kind(events, "failed") or of_kind(events, "committed"):
            break
        count += 1
    return count


def last_commits(bucket: Bucket, attempt: int, *, attempts: int = 3) -> list[Event]:
    """Return the events of the newest attempt that committed a checkpoint.

    Only the last `attempts` attempts before `attempt` are read.
    """
    for number in range(attempt - 1, max(0, attempt - 1 - attempts), -1):
        events = _read_events(bucket, number)
        if of_kind(events, "committed"):
            return events
    return []


def events_before(bucket: Bucket, attempt: int) -> list[list[Event]]:
    """Return the events of each attempt before `attempt`, in order."""
    return [_read_events(bucket, number) for number in range(1, attempt)]


def _read_events(bucket: Bucket, attempt: int) -> list[Event]:
    return parse(bucket.get_or_none(events_key(attempt)) or b"")

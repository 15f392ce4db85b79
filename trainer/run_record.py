"""`run.json`: what a run trains, written once; and what its earlier attempts came to."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel, ConfigDict

from trainer.bucket import Bucket
from trainer.bucket.layout import RUN_KEY, events_key
from trainer.errors import RecipeError
from trainer.events import Event, of_kind, parse
from trainer.recipe import Recipe


class RunRecord(BaseModel):
    """The run's identity; every attempt must agree with it."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    created: datetime
    recipe: Recipe
    recipe_digest: str
    notes: tuple[str, ...]
    versions: dict[str, str]


def write_or_compare(bucket: Bucket, run_id: str, recipe: Recipe, notes: tuple[str, ...]) -> None:
    """Write `run.json`, or see that the run is of the same recipe.

    Raises:
        RecipeError: the run was started with another recipe; names what differs.
    """
    mine = RunRecord(
        run_id=run_id,
        created=datetime.now(UTC),
        recipe=recipe,
        recipe_digest=recipe.digest(),
        notes=notes,
        versions={"aeolus": _own_version(), "python": platform.python_version()},
    )
    if bucket.create(RUN_KEY, mine.model_dump_json(indent=2).encode()):
        return
    theirs = RunRecord.model_validate_json(bucket.get(RUN_KEY))
    if theirs.recipe_digest == mine.recipe_digest:
        return
    raise RecipeError(
        f"run {run_id} was started with another recipe: {'; '.join(theirs.recipe.differences(recipe))}",
        hint="give this one another run id, or start it with the recipe that the run began with",
    )


def read(bucket: Bucket) -> RunRecord:
    """What the run trains.

    Raises:
        FileNotFoundError: the run has not begun.
    """
    return RunRecord.model_validate_json(bucket.get(RUN_KEY))


def report_id(bucket: Bucket) -> str:
    """By which a tracker tells this run from others of its name."""
    return f"{bucket.uri} {read(bucket).created.isoformat()}"


def fruitless_attempts(bucket: Bucket, attempt: int) -> int:
    """How many attempts just before `attempt` died in a row without committing a checkpoint."""
    count = 0
    for number in range(attempt - 1, 0, -1):
        events = parse(bucket.get_or_none(events_key(number)) or b"")
        if not of_kind(events, "failed") or of_kind(events, "committed"):
            break
        count += 1
    return count


def last_commits(bucket: Bucket, attempt: int, *, attempts: int = 3) -> list[Event]:
    """The events of the last attempt before `attempt` that committed a checkpoint, if it is a recent one."""
    for number in range(attempt - 1, max(0, attempt - 1 - attempts), -1):
        events = parse(bucket.get_or_none(events_key(number)) or b"")
        if of_kind(events, "committed"):
            return events
    return []


def events_before(bucket: Bucket, attempt: int) -> list[list[Event]]:
    """The events of each attempt before `attempt`, in their order."""
    return [parse(bucket.get_or_none(events_key(number)) or b"") for number in range(1, attempt)]


def _own_version() -> str:
    try:
        return version("aeolus")
    except PackageNotFoundError:
        return "source"

"""Log-probabilities of DPO's references that lie beside the runs of a folder, and that none of them needs any more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.checkpoints.inspect import PATIENCE
from launcher.runs.listing import AT_ONCE
from trainer.bucket import Bucket, list_runs, open_run
from trainer.bucket.address import canonical
from trainer.bucket.layout import RUN_FOLDERS, RUN_KEY
from trainer.bucket.manifest import final
from trainer.bucket.reference_cache import Entry, listed, shelves
from trainer.bucket.store import in_parallel
from trainer.errors import BucketError, UserError
from trainer.fit import reference_of
from trainer.recipe import Recipe
from trainer.recipe.model import reference_key


@dataclass(frozen=True)
class RunReference:
    """What one run keeps of one reference."""

    recipe: str
    """Digest of what recipes say that may share it."""
    entry: Entry

    @property
    def bytes(self) -> int:
        return sum(each.size for each in self.entry.objects)

    def as_dict(self) -> dict[str, Any]:
        shelved = self.entry.shelved
        return {
            "run": self.entry.run_id,
            "fingerprint": self.entry.fingerprint,
            "pairs": shelved.pairs if shelved else None,
            "created": shelved.created.isoformat() if shelved else None,
            "files": len(self.entry.objects),
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class References:
    """All that is kept below a folder of runs."""

    unused: tuple[RunReference, ...]
    needed: tuple[RunReference, ...]


def find_runs(uri: str, cwd: Path) -> str:
    """The canonical address of a folder of runs.

    Raises:
        BucketError: it is a run, or there is nothing; with the way out.
        Unavailable: nothing answers there.
    """
    address = canonical(uri, cwd)
    names = list_runs(address, patience=PATIENCE)
    if RUN_FOLDERS & set(names):
        above = address.rpartition("/")[0]
        raise BucketError(f"{address} is a run, and references lie beside the runs", hint=f"name {above}")
    if not names and not shelves(address, patience=PATIENCE):
        raise BucketError(f"no runs and no references are in {address}")
    return address


def survey(runs: str, older_than: timedelta, *, now: datetime | None = None) -> References:
    """What `prune` would delete, and what it leaves.

    An entry stays

    - as long as a run of the folder that has no final model yet may use it: the one that keeps it, and all whose
      recipes say the same of model and data;
    - until it is `older_than`, for the next run of a series, whatever became of the one that keeps it.

    What no manifest names is of no use to anybody: it goes once its run is finished or gone. Runs are looked at after
    the entries: one that begins later finds an entry whole, or computes its log-probabilities itself.

    Raises:
        UserError: a run that is not finished cannot be read, so that nobody knows what it needs.
        BucketError, Unavailable: as in `Bucket`.
    """
    found = [
        RunReference(recipe, entry)
        for recipe, bucket in shelves(runs, patience=PATIENCE).items()
        for entry in listed(bucket)
    ]
    before = (now or datetime.now(UTC)) - older_than
    names = list_runs(runs, patience=PATIENCE) if found else []
    told = in_parallel(lambda name: _wanted(runs, name), names, threads=AT_ONCE)
    wanted = {name: recipe for name, recipe in zip(names, told, strict=True) if recipe is not None}

    def is_needed(kept: RunReference) -> bool:
        shelved = kept.entry.shelved
        if kept.entry.run_id in wanted:
            return True
        return shelved is not None and (kept.recipe in wanted.values() or shelved.created > before)

    return References(
        tuple(kept for kept in found if not is_needed(kept)), tuple(kept for kept in found if is_needed(kept))
    )


def prune(runs: str, shown: Sequence[RunReference], older_than: timedelta) -> None:
    """Delete of what was shown all that is still not needed, and as it was; manifests go before files."""
    still = set(survey(runs, older_than).unused)
    buckets = shelves(runs, patience=PATIENCE)
    for kept in shown:
        if kept in still:
            buckets[kept.recipe].delete(each.key for each in kept.entry.objects)


def _wanted(runs: str, name: str) -> str | None:
    """The digest of what a run may still use, empty if it has no reference; None if it is finished, or no run."""
    bucket = open_run(runs, name, patience=PATIENCE)
    if final(bucket) or (data := bucket.get_or_none(RUN_KEY)) is None:
        return None
    recipe = _recipe(bucket, data)
    return reference_key(recipe) if reference_of(recipe) == "precomputed" else ""


def _recipe(bucket: Bucket, data: bytes) -> Recipe:
    try:
        return Recipe.model_validate(json.loads(data)["recipe"])
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(
            f"{bucket.uri}/{RUN_KEY} cannot be read, so nobody knows which reference that run needs",
            hint="the version that wrote it can; or remove the run, if it is not to go on",
        ) from None

"""`launcher checkpoints prune`: delete a run's old checkpoints, or cached DPO reference log-probabilities.

Both show what would be deleted, ask on a terminal, and delete. The references are in the folder of runs, beside the
runs that share them (`trainer.bucket.reference_cache`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from launcher import render
from launcher.checkpoints.inspect import PATIENCE
from launcher.runs.listing import AT_ONCE
from trainer.bucket import Bucket, list_runs, open_run, retention
from trainer.bucket.address import canonical
from trainer.bucket.attempts import Attempt
from trainer.bucket.byte_streams import in_parallel
from trainer.bucket.layout import ATTEMPTS_PREFIX, RUN_FOLDERS, RUN_KEY
from trainer.bucket.manifest import final
from trainer.bucket.reference_cache import Entry, cached_recipes, list_entries
from trainer.errors import BucketError, UserError
from trainer.fit import reference_of
from trainer.recipe import Recipe
from trainer.recipe.model import reference_key

REFERENCES_OLDER_THAN_H = 7 * 24.0
"""Default age: younger references stay, so that the next run of a series can use them."""


@dataclass(frozen=True)
class RunReference:
    """The reference log-probabilities that one run has cached for one model and data set."""

    recipe: str
    """Digest of the recipe's keys for model and data; runs with the same digest share references."""
    entry: Entry

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.entry.objects)

    def as_dict(self) -> dict[str, Any]:
        manifest = self.entry.manifest
        return {
            "run": self.entry.run_id,
            "fingerprint": self.entry.fingerprint,
            "pairs": manifest.pairs if manifest else None,
            "created": manifest.created.isoformat() if manifest else None,
            "files": len(self.entry.objects),
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class References:
    """All cached references of a folder of runs."""

    unused: tuple[RunReference, ...]
    needed: tuple[RunReference, ...]


def prune_checkpoints(bucket: Bucket, keep: int, *, yes: bool, as_json: bool) -> None:
    """Delete all but the newest `keep` checkpoints of a run, and the uncommitted files of lost machines.

    It is safe while an attempt is running, because it deletes what the newest attempt's own retention deletes:
    checkpoints below the newest `keep` whole ones, manifests first; and files that no manifest names, if they are below
    the newest commit and belong to an earlier attempt, which can no longer commit, or below the newest attempt's own
    newest commit, because that attempt only uploads higher steps.

    Raises:
        Superseded: a new attempt has claimed the run in the meantime.
    """
    attempt = newest_attempt(bucket)
    old = retention.outdated(bucket, attempt.number, keep)
    what = (
        f"{len(old.steps)} checkpoints (steps {_join(old.steps)}), {len(old.keys)} files,"
        f" {render.size(old.bytes)}; steps {_join(old.kept)} stay"
    )
    is_anything_old = bool(old.steps or old.keys)
    confirmed = is_anything_old and _confirm(what, yes=yes, as_json=as_json)
    if confirmed:
        retention.prune(bucket, attempt, keep)
    if as_json:
        deleted = {"steps": old.steps, "files": len(old.keys), "bytes": old.bytes, "kept": old.kept}
        click.echo(render.to_json({"run": bucket.run_id, "uri": bucket.uri, **deleted, "deleted": confirmed}))
    else:
        _print_result(what if is_anything_old else None, f"steps {_join(old.kept)} stay", confirmed=confirmed)


def prune_references(uri: str, older_than_h: float, *, yes: bool, as_json: bool) -> None:
    """Delete the cached references of a folder of runs that no run needs."""
    runs, older_than = find_runs(uri, Path.cwd()), timedelta(hours=older_than_h)
    found = survey_references(runs, older_than)
    old = found.unused
    files, size = sum(len(reference.entry.objects) for reference in old), sum(item.bytes for item in old)
    stay = f"{len(found.needed)} stay"
    run_ids = ", ".join(sorted({reference.entry.run_id for reference in old}))
    what = f"{len(old)} references (of {run_ids}), {files} files, {render.size(size)}; {stay}"
    confirmed = bool(old) and _confirm(what, yes=yes, as_json=as_json)
    if confirmed:
        delete_references(runs, old, older_than)
    if as_json:
        rows = {"references": [reference.as_dict() for reference in old], "files": files, "bytes": size}
        click.echo(render.to_json({"uri": runs, **rows, "kept": len(found.needed), "deleted": confirmed}))
    else:
        _print_result(what if old else None, stay, confirmed=confirmed)


def newest_attempt(bucket: Bucket) -> Attempt:
    """Return the newest attempt of a run; it detects whether another one has claimed the run since."""
    names = [
        item.key.removeprefix(ATTEMPTS_PREFIX).removesuffix(".json") for item in bucket.list(ATTEMPTS_PREFIX)
    ]
    return Attempt(bucket, max((int(name) for name in names if name.isdecimal()), default=0))


def find_runs(uri: str, cwd: Path) -> str:
    """Return the canonical address of a folder of runs.

    Raises:
        BucketError: `uri` is a run, or it holds neither runs nor references.
        Unavailable: the store does not answer.
    """
    address = canonical(uri, cwd)
    names = list_runs(address, patience=PATIENCE)
    if RUN_FOLDERS & set(names):
        parent = address.rpartition("/")[0]
        raise BucketError(
            f"{address} is a run, but references are stored in the folder of runs", hint=f"use {parent}"
        )
    if not names and not cached_recipes(address, patience=PATIENCE):
        raise BucketError(
            f"no runs and no references are in {address}", hint="check the address of the folder of runs"
        )
    return address


def survey_references(runs: str, older_than: timedelta, *, now: datetime | None = None) -> References:
    """Return which cached references no run needs, and which stay.

    An entry stays

    - while a run without a final model may use it: the run that cached it, and every run whose recipe has the same
      model and data;
    - until it is `older_than`, for the next run of a series, even if the run that cached it is gone.

    Files without a manifest are useless: they are deleted once their run is finished or gone. Runs are read after the
    entries. A run that starts in between finds an entry whole, or computes its log-probabilities itself.

    Raises:
        UserError: an unfinished run's record cannot be read, so its needs are unknown.
        BucketError, Unavailable: as in `Bucket`.
    """
    found = [
        RunReference(recipe, entry)
        for recipe, bucket in cached_recipes(runs, patience=PATIENCE).items()
        for entry in list_entries(bucket)
    ]
    oldest = (now or datetime.now(UTC)) - older_than
    names = list_runs(runs, patience=PATIENCE) if found else []
    digests = in_parallel(lambda name: _needed_reference(runs, name), names, threads=AT_ONCE)
    needed = {name: digest for name, digest in zip(names, digests, strict=True) if digest is not None}

    def is_needed(reference: RunReference) -> bool:
        manifest = reference.entry.manifest
        if reference.entry.run_id in needed:
            return True
        return manifest is not None and (reference.recipe in needed.values() or manifest.created > oldest)

    return References(
        tuple(reference for reference in found if not is_needed(reference)),
        tuple(reference for reference in found if is_needed(reference)),
    )


def delete_references(runs: str, shown: Sequence[RunReference], older_than: timedelta) -> None:
    """Delete the references that were shown, except those that changed or became needed since; manifests go first."""
    still_unused = set(survey_references(runs, older_than).unused)
    buckets = cached_recipes(runs, patience=PATIENCE)
    for reference in shown:
        if reference in still_unused:
            buckets[reference.recipe].delete(item.key for item in reference.entry.objects)


def _needed_reference(runs: str, name: str) -> str | None:
    """Return the digest of the reference that a run may still use.

    It is empty if the run uses no cached reference, and None if the run is finished or is not a run.
    """
    bucket = open_run(runs, name, patience=PATIENCE)
    if final(bucket) or (data := bucket.get_or_none(RUN_KEY)) is None:
        return None
    recipe = _read_recipe(bucket, data)
    return reference_key(recipe) if reference_of(recipe) == "precomputed" else ""


def _read_recipe(bucket: Bucket, data: bytes) -> Recipe:
    try:
        return Recipe.model_validate(json.loads(data)["recipe"])
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(
            f"{bucket.uri}/{RUN_KEY} cannot be read: the cached reference that this run needs is therefore unknown",
            hint="use the version that wrote it, or delete the run if it will not be continued",
        ) from None


def _confirm(what: str, *, yes: bool, as_json: bool) -> bool:
    """Return whether to delete: the value of --yes, or the user's answer on a terminal."""
    if yes or as_json or not sys.stdin.isatty():
        return yes
    return click.confirm(f"delete {what}?", err=True)


def _print_result(what: str | None, stay: str, *, confirmed: bool) -> None:
    if what is None:
        click.echo(f"nothing to delete; {stay}")
    elif confirmed:
        click.echo(f"deleted {what}")
    else:
        click.echo(f"would delete {what}\nnothing was deleted: add --yes to delete")


def _join(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"

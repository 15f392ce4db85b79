"""The cache of log-probabilities of DPO's reference models, which all runs of a folder share.

    reference/<recipe>/<fingerprint>/<run>.json           manifest: files with sizes and checksums, created last
    reference/<recipe>/<fingerprint>/<run>/<serial>/...   what that run has computed, or copied from others, so far

`<recipe>` is a digest of the recipe's keys for model and data. A supervisor has neither model nor data, and finds entries
by this digest. The fingerprint is computed from the weights and tokens; a worker uses only entries with its own
fingerprint.

Each run has its own files, so no run writes to files that another reads. Two runs that compute the same values on
different machines each keep their own last bits.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.bucket.address import Patience
from trainer.bucket.commit import upload_files
from trainer.bucket.layout import (
    reference_manifest_key,
    reference_owner,
    reference_prefix,
    reference_uri,
)
from trainer.bucket.manifest import File
from trainer.bucket.restore import CorruptCheckpoint, fetch
from trainer.bucket.store import PATIENCE, Bucket, Object, list_runs, open_run
from trainer.staged import Staged

log = logging.getLogger(__name__)
MOST_ENTRIES = 8
"""The most entries, each from one run, that are fetched for a recipe."""


class ReferenceManifest(BaseModel):
    """The manifest of one run's entry."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    attempt: int
    fingerprint: str
    pairs: int
    """Number of pairs whose log-probabilities are known."""
    created: datetime
    files: tuple[File, ...]

    @property
    def key(self) -> str:
        return reference_manifest_key(self.fingerprint, self.run_id)

    @property
    def prefix(self) -> str:
        return f"{reference_prefix(self.fingerprint, self.run_id)}{self.attempt:04d}-{self.pairs:09d}/"


class Entry(NamedTuple):
    """All objects of one run and one fingerprint, from a listing."""

    run_id: str
    fingerprint: str
    manifest: ReferenceManifest | None
    """None if the manifest is missing or unreadable. No run uses the files then."""
    objects: tuple[Object, ...]
    """The manifest first, if there is one."""


class ReferenceCache:
    """One recipe's entries in the cache, as one attempt of a run uses them."""

    def __init__(self, bucket: Bucket, run_id: str, attempt: int) -> None:
        self._bucket = bucket
        self._run_id = run_id
        self._attempt = attempt

    def put(self, folder: Path, staged: Staged) -> ReferenceManifest:
        """Replace this run's entry by a staged folder.

        The new files are uploaded first, then the manifest; the old files are deleted last.

        Raises:
            BucketError, Unavailable: as in `Bucket`; the old entry stays.
        """
        mine = ReferenceManifest(
            run_id=self._run_id,
            attempt=self._attempt,
            fingerprint=str(staged.details["fingerprint"]),
            pairs=int(staged.details["pairs"]),
            created=datetime.now(UTC),
            files=(),
        )
        mine = mine.model_copy(update={"files": upload_files(self._bucket, mine.prefix, folder)})
        self._bucket.put(mine.key, mine.model_dump_json(indent=1).encode())
        below = reference_prefix(mine.fingerprint, self._run_id)
        self._bucket.delete(
            object_.key for object_ in self._bucket.list(below) if not object_.key.startswith(mine.prefix)
        )
        return mine

    def fetch(self, into: Path) -> list[Path]:
        """Download the entries that verify, one folder each: this run's entry first, then the largest.

        Raises:
            BucketError, Unavailable: as in `Bucket`.
        """
        folders = []
        for number, manifest in enumerate(self._manifests()[:MOST_ENTRIES]):
            folder = into / f"{number:04d}-{manifest.run_id}"
            try:
                fetch(self._bucket, manifest, folder)
            except CorruptCheckpoint as error:
                log.warning("log-probabilities of the reference are corrupt and not used: %s", error.message)
                continue
            folders.append(folder)
        return folders

    def _manifests(self) -> list[ReferenceManifest]:
        manifests = [entry.manifest for entry in list_entries(self._bucket) if entry.manifest]
        return sorted(
            manifests, key=lambda one: (one.run_id != self._run_id, -one.pairs, one.created, one.run_id)
        )


def open_cache(checkpoints: str, recipe: str, *, run_id: str, attempt: int) -> ReferenceCache:
    """Open the cache of a recipe, named by its digest, below the folder of runs.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    return ReferenceCache(open_run(reference_uri(checkpoints), recipe), run_id, attempt)


def cached_recipes(checkpoints: str, *, patience: Patience = PATIENCE) -> dict[str, Bucket]:
    """Return the digests of all recipes that have entries below the folder of runs, each with its bucket.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    place = reference_uri(checkpoints)
    return {
        recipe: open_run(place, recipe, patience=patience) for recipe in list_runs(place, patience=patience)
    }


def list_entries(bucket: Bucket) -> list[Entry]:
    """Return the entries of a recipe.

    Raises:
        BucketError, Unavailable: as in `Bucket`.
    """
    found: dict[tuple[str, str], list[Object]] = {}
    for object_ in bucket.list():
        if owner := reference_owner(object_.key):
            found.setdefault((owner.fingerprint, owner.run_id), []).append(object_)
    entries = []
    for (fingerprint, run_id), objects in sorted(found.items()):
        key = reference_manifest_key(fingerprint, run_id)
        objects.sort(key=lambda object_: (object_.key != key, object_.key))
        manifest = _read(bucket, key) if objects[0].key == key else None
        entries.append(Entry(run_id, fingerprint, manifest, tuple(objects)))
    return entries


def _read(bucket: Bucket, key: str) -> ReferenceManifest | None:
    data = bucket.get_or_none(key)
    try:
        manifest = ReferenceManifest.model_validate_json(data or b"")
    except ValidationError:
        log.warning("%s/%s is not a valid manifest and is ignored", bucket.uri, key)
        return None
    return manifest if manifest.key == key else None

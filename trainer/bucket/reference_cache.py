"""Log-probabilities of DPO's reference models, beside the runs of a bucket and shared by them.

    reference/<recipe>/<fingerprint>/<run>.json           manifest: files with sizes and checksums, created last
    reference/<recipe>/<fingerprint>/<run>/<serial>/...   what that run has computed, or taken over, so far

`<recipe>` is a digest of what a recipe says of model and data, by which a supervisor, who has neither, finds what may
be of use; the fingerprint, of the weights and tokens themselves, is what a worker goes by. Each run has its own files:
of two that compute the same on unlike machines each keeps its last bits, and neither writes to what the other reads.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.bucket.address import Patience
from trainer.bucket.commit import upload_files
from trainer.bucket.layout import reference_manifest_key, reference_owner, reference_prefix, reference_uri
from trainer.bucket.manifest import File
from trainer.bucket.restore import CorruptCheckpoint, fetch
from trainer.bucket.store import PATIENCE, Bucket, Object, list_runs, open_run
from trainer.staged import Staged

log = logging.getLogger(__name__)
AT_MOST = 8
"""Of the runs that have computed something for a recipe; more are not fetched."""


class ReferenceManifest(BaseModel):
    """The manifest of what one run keeps."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    attempt: int
    fingerprint: str
    pairs: int
    """That are known."""
    created: datetime
    files: tuple[File, ...]

    @property
    def key(self) -> str:
        return reference_manifest_key(self.fingerprint, self.run_id)

    @property
    def prefix(self) -> str:
        return f"{reference_prefix(self.fingerprint, self.run_id)}{self.attempt:04d}-{self.pairs:09d}/"


class ReferenceCache:
    """What a bucket keeps for a recipe, to one attempt of a run."""

    def __init__(self, bucket: Bucket, run_id: str, attempt: int) -> None:
        self._bucket = bucket
        self._run_id = run_id
        self._attempt = attempt

    def put(self, folder: Path, staged: Staged) -> ReferenceManifest:
        """Upload a staged folder in place of this run's earlier one: files, then the manifest, then the old files go.

        Raises:
            BucketError, Unavailable: as in `Bucket`; what was kept before still is.
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
            each.key for each in self._bucket.list(below) if not each.key.startswith(mine.prefix)
        )
        return mine

    def fetch(self, into: Path) -> list[Path]:
        """Bring what may be of use, a folder for each run that verifies: this run's own first, then the fullest.

        Raises:
            BucketError, Unavailable: as in `Bucket`.
        """
        folders = []
        for number, shelved in enumerate(self._found()[:AT_MOST]):
            folder = into / f"{number:04d}-{shelved.run_id}"
            try:
                fetch(self._bucket, shelved, folder)
            except CorruptCheckpoint as error:
                log.warning("log-probabilities of the reference are not believed: %s", error.message)
                continue
            folders.append(folder)
        return folders

    def _found(self) -> list[ReferenceManifest]:
        found = [shelved for one in listed(self._bucket) if (shelved := one.shelved)]
        return sorted(
            found, key=lambda one: (one.run_id != self._run_id, -one.pairs, one.created, one.run_id)
        )


class Entry(NamedTuple):
    """All that lies there of one run and one fingerprint, as a listing has it."""

    run_id: str
    fingerprint: str
    shelved: ReferenceManifest | None
    """None if there is no manifest, or none that can be read: nobody uses what lies there."""
    objects: tuple[Object, ...]
    """The manifest first, if there is one."""


def listed(bucket: Bucket) -> list[Entry]:
    """What the shelf of a recipe holds.

    Raises:
        BucketError, Unavailable: as in `Bucket`.
    """
    found: dict[tuple[str, str], list[Object]] = {}
    for each in bucket.list():
        if owner := reference_owner(each.key):
            found.setdefault((owner.fingerprint, owner.run_id), []).append(each)
    entries = []
    for (fingerprint, run_id), objects in sorted(found.items()):
        key = reference_manifest_key(fingerprint, run_id)
        objects.sort(key=lambda each: (each.key != key, each.key))
        shelved = _read(bucket, key) if objects[0].key == key else None
        entries.append(Entry(run_id, fingerprint, shelved, tuple(objects)))
    return entries


def _read(bucket: Bucket, key: str) -> ReferenceManifest | None:
    data = bucket.get_or_none(key)
    try:
        shelved = ReferenceManifest.model_validate_json(data or b"")
    except ValidationError:
        log.warning("%s/%s is no manifest, and passed over", bucket.uri, key)
        return None
    return shelved if shelved.key == key else None


def shelves(checkpoints: str, *, patience: Patience = PATIENCE) -> dict[str, Bucket]:
    """Of every recipe that something is kept for below the folder of runs, by its digest.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    place = reference_uri(checkpoints)
    return {
        recipe: open_run(place, recipe, patience=patience) for recipe in list_runs(place, patience=patience)
    }


def open_shelf(checkpoints: str, recipe: str, *, run_id: str, attempt: int) -> ReferenceCache:
    """The shelf of a recipe, by its digest, below the folder of runs.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    return ReferenceCache(open_run(reference_uri(checkpoints), recipe), run_id, attempt)

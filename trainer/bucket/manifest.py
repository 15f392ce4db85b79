"""Manifests: a checkpoint exists if and only if its manifest does.

    checkpoints/step-00000100/0003/...   files of step 100, uploaded by attempt 3
    commits/step-00000100.json           manifest: attempt 3, its files with sizes and checksums
    final/...                            the exported model
    commits/final.json                   its manifest

Each attempt uploads a checkpoint's files into a folder of its own. An attempt that has lost its run may not know it yet
(a frozen machine, a cut network), and no object store can fence it off. In a shared folder it could overwrite files
that its successor's manifest names. In its own folder it can only leave files that no manifest names.

The final model is the exception, because users need one fixed address. There, the attempt checks before each file that
it still owns the run. An attempt that freezes between this check and the write overwrites a file with the same bytes,
since training is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from trainer.bucket.layout import (
    COMMITS_PREFIX,
    FINAL_COMMIT_KEY,
    FINAL_PREFIX,
    commit_key,
    committed_step,
    upload_prefix,
)
from trainer.bucket.store import Bucket
from trainer.errors import UserError
from trainer.staged import CHECKPOINT_FORMAT

WEIGHTS = (".safetensors", ".bin")
NO_WEIGHTS = "training_args.bin"  # Transformers stores the machine's paths in it


class File(BaseModel):
    """One file of a checkpoint or model."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Relative, with forward slashes."""
    size: int
    """Bytes."""
    xxh3: str
    """128 bits, hex."""

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        """Reject paths that a restore would write outside its folder."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path:
            raise ValueError(f"{path!r} is not a path inside a checkpoint")
        return path


class Manifest(BaseModel):
    """A committed checkpoint, or the final model. Unknown fields, from newer releases, are ignored."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    attempt: int
    step: int
    kind: Literal["checkpoint", "final"]
    format: int = 1
    """Format of a checkpoint's files, see `trainer.staged.CHECKPOINT_FORMAT`. Release 0.1 did not write it."""
    release: str = ""
    """The release of this package that wrote the files; empty before format 2."""
    created: datetime
    recipe: str
    """Digest of the recipe."""
    details: dict[str, Any]
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Total size of all files in bytes."""
        return sum(file.size for file in self.files)

    @property
    def prefix(self) -> str:
        """Prefix of the files in the run; ends with a slash."""
        return files_prefix(self.kind, self.step, self.attempt)

    @property
    def key(self) -> str:
        """Key of this manifest in the run."""
        return FINAL_COMMIT_KEY if self.kind == "final" else commit_key(self.step)

    @property
    def is_known(self) -> bool:
        """Whether this release can read the files."""
        return self.format <= CHECKPOINT_FORMAT

    @property
    def unknown_format(self) -> str:
        """What to say of files in an unknown format."""
        return (
            f"{self.key} of run {self.run_id} has checkpoint format {self.format} of release {self.release}, but this"
            f" release reads formats up to {CHECKPOINT_FORMAT}"
        )

    def refuse_unknown(self) -> None:
        """Raise `UserError` if the files have a format that this release cannot read."""
        if not self.is_known:
            raise UserError(self.unknown_format, hint="install that release or a later one")

    @property
    def weights_digest(self) -> str:
        """A hex digest of the checksums of all weight files: equal if and only if the weights are equal."""
        lines = sorted(
            f"{file.path} {file.xxh3}\n"
            for file in self.files
            if file.path.endswith(WEIGHTS) and not file.path.endswith(NO_WEIGHTS)
        )
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())

    def fault(self, sizes: Mapping[str, int]) -> str | None:
        """Return which file is missing or has another size, given the sizes of the bucket's objects; None if all match."""
        if not self.files:
            return f"{self.key} names no files"
        if not self.is_known:
            return self.unknown_format
        for file in self.files:
            key = self.prefix + file.path
            if key not in sizes:
                return f"{key} is missing, expected {file.size} bytes"
            if sizes[key] != file.size:
                return f"{key} has {sizes[key]} bytes, expected {file.size}"
        return None


class CommittedFiles(Protocol):
    """Files in a bucket, and their common prefix."""

    @property
    def files(self) -> tuple[File, ...]: ...
    @property
    def prefix(self) -> str: ...


class Unreadable(NamedTuple):
    """An object at a manifest's key that is truncated, or is no valid manifest."""

    step: int
    reason: str


def files_prefix(kind: Literal["checkpoint", "final", "reference"], step: int, attempt: int) -> str:
    """Return the prefix of the files that an attempt uploads for a step, or for the final model.

    Raises:
        ValueError: for a reference, which goes to the reference cache and is not committed.
    """
    if kind == "reference":
        raise ValueError("log-probabilities of a reference are not a checkpoint")
    return FINAL_PREFIX if kind == "final" else upload_prefix(step, attempt)


def is_of_later_release(manifest: Manifest | Unreadable) -> bool:
    """Return whether only a later release can read the files of a manifest."""
    return isinstance(manifest, Manifest) and not manifest.is_known


def read(bucket: Bucket, key: str, step: int = 0) -> Manifest | Unreadable | None:
    """Return the manifest at a key; None if there is no object."""
    data = bucket.get_or_none(key)
    if data is None:
        return None
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        return Unreadable(
            step, f"{key} ({len(data)} bytes) is not a manifest: {at + ': ' if at else ''}{first['msg']}"
        )
    if manifest.key != key:
        return Unreadable(step, f"{key} holds the manifest of {manifest.kind} step {manifest.step}")
    return manifest


def commits(bucket: Bucket) -> Iterator[Manifest | Unreadable]:
    """Yield the manifests of checkpoints, newest step first. Each is read only when it is needed."""
    found = (committed_step(object_.key) for object_ in bucket.list(COMMITS_PREFIX))
    for step in sorted((step for step in found if step is not None), reverse=True):
        if (manifest := read(bucket, commit_key(step), step)) is not None:
            yield manifest


def committed(bucket: Bucket) -> list[Manifest]:
    """Return the readable manifests of checkpoints, newest step first. `Manifest.fault` checks their files."""
    return [manifest for manifest in commits(bucket) if isinstance(manifest, Manifest)]


def final(bucket: Bucket) -> Manifest | None:
    """Return the final model's manifest if it is committed and all its files exist with the right sizes.

    Raises:
        UserError: the files have a format that this release cannot read.
    """
    manifest = read(bucket, FINAL_COMMIT_KEY)
    if not isinstance(manifest, Manifest):
        return None
    manifest.refuse_unknown()
    return None if manifest.fault(sizes(bucket, FINAL_PREFIX)) else manifest


def sizes(bucket: Bucket, prefix: str) -> dict[str, int]:
    """Return the size in bytes of each object below the prefix, by key."""
    return {object_.key: object_.size for object_ in bucket.list(prefix)}

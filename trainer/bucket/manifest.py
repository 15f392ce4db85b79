"""Manifests: what makes a checkpoint one. No manifest, no checkpoint.

    checkpoints/step-00000100/0003/...   files of step 100, uploaded by attempt 3
    commits/step-00000100.json           manifest: attempt 3, its files with sizes and checksums
    final/...                            the exported model
    commits/final.json                   its manifest

A checkpoint's files lie in a folder of the attempt that uploaded them, because an attempt that has
lost its run does not know it at once (a frozen machine, a cut network) and no object store can
fence it off: in a folder shared by all attempts it could overwrite files under its successor's
manifest. Here the worst that it can do is to leave files that no manifest names. The final model
is the exception, for its address is what people use: there, each file is preceded by a look at who
owns the run, and what an attempt frozen just then could overwrite has the same bytes, since
training is exact.
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

WEIGHTS = (".safetensors", ".bin")
NO_WEIGHTS = "training_args.bin"  # Transformers keeps paths of the machine in it


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
        """What a bucket says must not write outside the folder that it is restored to."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path:
            raise ValueError(f"{path!r} is no path inside a checkpoint")
        return path


class Manifest(BaseModel):
    """A committed checkpoint, or the final model. Fields that a newer version adds are ignored."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    attempt: int
    step: int
    kind: Literal["checkpoint", "final"]
    created: datetime
    recipe: str
    """Digest of the recipe."""
    details: dict[str, Any]
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def prefix(self) -> str:
        """Where the files lie in the run; ends at a slash."""
        return files_prefix(self.kind, self.step, self.attempt)

    @property
    def key(self) -> str:
        """Where this manifest lies in the run."""
        return FINAL_COMMIT_KEY if self.kind == "final" else commit_key(self.step)

    @property
    def weights_digest(self) -> str:
        """One hex over the checksums of the files of weights: equal if and only if the weights are."""
        lines = sorted(
            f"{file.path} {file.xxh3}\n"
            for file in self.files
            if file.path.endswith(WEIGHTS) and not file.path.endswith(NO_WEIGHTS)
        )
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())

    def fault(self, sizes: Mapping[str, int]) -> str | None:
        """Why this manifest must not be believed, given the sizes of the bucket's objects; None if it may."""
        if not self.files:
            return f"{self.key} names no files"
        for file in self.files:
            key = self.prefix + file.path
            if key not in sizes:
                return f"{key} is missing, expected {file.size} bytes"
            if sizes[key] != file.size:
                return f"{key} has {sizes[key]} bytes, expected {file.size}"
        return None


class CommittedFiles(Protocol):
    """Files of a bucket, with where they lie."""

    @property
    def files(self) -> tuple[File, ...]: ...
    @property
    def prefix(self) -> str: ...


class Unreadable(NamedTuple):
    """A manifest that is cut short, or no manifest at all."""

    step: int
    reason: str


def files_prefix(kind: Literal["checkpoint", "final", "reference"], step: int, attempt: int) -> str:
    """Where an attempt uploads the files of a step, or the final model; ends at a slash.

    Raises:
        ValueError: of a reference, which is shelved and not committed.
    """
    if kind == "reference":
        raise ValueError("log-probabilities of a reference are no checkpoint")
    return FINAL_PREFIX if kind == "final" else upload_prefix(step, attempt)


def read(bucket: Bucket, key: str, step: int = 0) -> Manifest | Unreadable | None:
    """The manifest at a key; None if there is nothing."""
    data = bucket.get_or_none(key)
    if data is None:
        return None
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        return Unreadable(
            step, f"{key} ({len(data)} bytes) is no manifest: {at + ': ' if at else ''}{first['msg']}"
        )
    if manifest.key != key:
        return Unreadable(step, f"{key} holds the manifest of {manifest.kind} step {manifest.step}")
    return manifest


def commits(bucket: Bucket) -> Iterator[Manifest | Unreadable]:
    """What was committed as a checkpoint, newest step first, read one by one."""
    found = (committed_step(object_.key) for object_ in bucket.list(COMMITS_PREFIX))
    for step in sorted((step for step in found if step is not None), reverse=True):
        if (manifest := read(bucket, commit_key(step), step)) is not None:
            yield manifest


def committed(bucket: Bucket) -> list[Manifest]:
    """The checkpoints, newest step first; whether their files are there is for `fault` to say."""
    return [manifest for manifest in commits(bucket) if isinstance(manifest, Manifest)]


def final(bucket: Bucket) -> Manifest | None:
    """The final model, if it is committed and all its files are there with their sizes."""
    manifest = read(bucket, FINAL_COMMIT_KEY)
    if not isinstance(manifest, Manifest):
        return None
    return None if manifest.fault(sizes(bucket, FINAL_PREFIX)) else manifest


def sizes(bucket: Bucket, prefix: str) -> dict[str, int]:
    """Bytes by key, of what lies below the prefix."""
    return {object_.key: object_.size for object_ in bucket.list(prefix)}

"""The addresses of checkpoints: folders of this machine and buckets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer.bucket.address import parse as parse_address


def folder_of(uri: str) -> Path | None:
    """The folder that a checkpoints address means; None for a bucket."""
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    return None if "://" in uri else Path(uri)


def canonical(uri: str, cwd: Path) -> str:
    """One spelling for one place: folders absolute, no slash at the end.

    Raises:
        BucketError: what is neither a folder nor the address of a bucket, such as `gcs://bucket`.
    """
    place = parse_address(uri)
    folder = folder_of(uri)
    return str(place) if folder is None else str((cwd / folder.expanduser()).resolve())

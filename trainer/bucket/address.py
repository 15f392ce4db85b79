"""Addresses of object stores, and how long to be patient with them."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import GCSStore, LocalStore, S3Store

from trainer.bucket.store_errors import sort_fault
from trainer.errors import BucketError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

VALID = "use s3://bucket/prefix, gs://bucket/prefix, file:///folder or a folder"
ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}


class Patience(NamedTuple):
    """How long faults that may pass are tried again, in seconds from the first try of a request."""

    open_s: float = 15.0
    """Somebody may be waiting at a terminal."""
    transfer_s: float = 180.0
    """obstore does not renew credentials between tries: keep it below 5 minutes."""
    request_s: float = 120.0
    """One try of one request; a part of 8 MiB must get through in it, also over a slow line."""


class BucketAddress(NamedTuple):
    """A URI taken apart."""

    scheme: Literal["s3", "gs", "file"]
    bucket: str
    """Empty for a folder."""
    path: str
    """Prefix without slashes at its ends, or an absolute folder."""

    def __str__(self) -> str:
        if self.scheme == "file":
            return self.path
        return f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")

    def child(self, name: str) -> BucketAddress:
        return self._replace(path=f"{self.path.rstrip('/')}/{name}" if self.path else name)


def parse(uri: str) -> BucketAddress:
    """Take a URI apart; a folder may be relative and may begin with `~`.

    Raises:
        BucketError: unknown scheme, or no bucket named.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme in ("s3", "gs"):
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise BucketError(f"{uri} names no bucket", hint=VALID)
        return BucketAddress(
            "s3" if scheme == "s3" else "gs", bucket, "/".join(filter(None, prefix.split("/")))
        )
    if separator and scheme == "file":
        return BucketAddress("file", "", _absolute(rest))
    if not uri or separator or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", uri):
        raise BucketError(f"{uri!r} is no address of a bucket that is known here", hint=VALID)
    return BucketAddress("file", "", _absolute(uri))


def folder_of(uri: str) -> Path | None:
    """Return the folder that a checkpoints address names; None if it names a bucket."""
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    return None if "://" in uri else Path(uri)


def canonical(uri: str, cwd: Path) -> str:
    """Return the one spelling of an address: folders are absolute, and no slash is at the end.

    Raises:
        BucketError: `uri` is neither a folder nor a bucket address, such as `gcs://bucket`.
    """
    place = parse(uri)
    folder = folder_of(uri)
    return str(place) if folder is None else str((cwd / folder.expanduser()).resolve())


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


def connect(place: BucketAddress, patience: Patience, *, opening: bool = False) -> ObjectStore:
    """A store whose keys are relative to `place`; for a bucket, nothing is sent yet.

    Raises:
        BucketError: a folder that cannot be made, or credentials that are incomplete.
    """
    retry = _retry(patience.open_s if opening else patience.transfer_s)
    client = _client(place, min(patience.request_s, patience.open_s) if opening else patience.request_s)
    try:
        if place.scheme == "s3":
            return S3Store(
                place.bucket,
                prefix=place.path or None,
                client_options=client,
                retry_config=retry,
                credential_provider=shared_file(),
            )
        if place.scheme == "gs":
            return GCSStore(
                place.bucket, prefix=place.path or None, client_options=client, retry_config=retry
            )
        return LocalStore(place.path, mkdir=True)
    except (BaseError, OSError, ValueError) as error:
        raise sort_fault(error, f"open {place}", opening=True) from None


def _retry(total_s: float) -> RetryConfig:
    # Backoffs grow from 0.1 s to the maximum, so that the time runs out before the 30 tries do.
    return {
        "max_retries": 30,
        "retry_timeout": timedelta(seconds=total_s),
        "backoff": {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=max(0.1, min(15.0, total_s / 6))),
            "base": 2,
        },
    }


def _client(place: BucketAddress, request_s: float) -> ClientConfig:
    client: ClientConfig = {
        "timeout": timedelta(seconds=request_s),
        "connect_timeout": timedelta(seconds=min(10.0, request_s)),
    }
    variables = ENDPOINT_VARIABLES.get(place.scheme, ())
    endpoint = next((os.environ[name] for name in variables if os.environ.get(name)), "")
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    return client


if TYPE_CHECKING:
    from obstore.store import S3Credential

READ_AGAIN = timedelta(seconds=30)
"""obstore asks anew for what lives shorter than 5 minutes: at each request, at most every 0.1 s."""


class SharedFile:
    """A profile of the file that `aws configure` writes, read again whenever obstore asks."""

    def __init__(self, path: Path, profile: str) -> None:
        self._path = path
        self._profile = profile

    def __call__(self) -> S3Credential:
        """What the file says now.

        Raises:
            OSError, ValueError: the file cannot be read, or lacks the profile or one of its keys; quotes no value.
        """
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(self._path.read_text())
        except configparser.Error:
            raise ValueError(f"{self._path} is no credentials file") from None
        if not parser.has_section(self._profile):
            raise ValueError(f"{self._path} has no credentials of profile {self._profile}")
        section = parser[self._profile]
        missing = [key for key in ("aws_access_key_id", "aws_secret_access_key") if not section.get(key)]
        if missing:
            raise ValueError(f"{self._path} has no {missing[0]} in profile {self._profile}")
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + READ_AGAIN,
        }


def shared_file(environ: Mapping[str, str] = os.environ) -> SharedFile | None:
    """The file that AWS's own tools would read; None where the environment or the machine gives credentials.

    Raises:
        OSError, ValueError: a file or profile was named, but is not there or is not whole.
    """
    if environ.get("AWS_ACCESS_KEY_ID") or environ.get("AWS_SECRET_ACCESS_KEY"):
        return None
    named = environ.get("AWS_SHARED_CREDENTIALS_FILE")
    path = Path(named or "~/.aws/credentials").expanduser()
    profile = environ.get("AWS_PROFILE")
    found = SharedFile(path, profile or "default")
    try:
        found()
    except (OSError, ValueError):
        if named or profile:
            raise
        return None
    return found

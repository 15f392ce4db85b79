"""Addresses of object stores, how to connect to them, and timeouts of their requests."""

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
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

VALID = "use s3://bucket/prefix, gs://bucket/prefix, file:///folder or a folder"
ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}
CREDENTIALS_LIFETIME = timedelta(seconds=30)
"""How long obstore may use credentials from a file. For lifetimes below 5 minutes it asks again before each request, at
most every 0.1 s, so renewed credentials are used at once."""


class Patience(NamedTuple):
    """Timeouts in seconds. Temporary faults are retried until the time since the first try of a request is up."""

    open_s: float = 15.0
    """For the first request to a store; a user may be waiting at a terminal."""
    transfer_s: float = 180.0
    """For all other requests. Below 5 minutes, because obstore does not renew credentials between retries."""
    request_s: float = 120.0
    """For one try of one request. A slow line must be able to transfer a part of 8 MiB in this time."""


class BucketAddress(NamedTuple):
    """A parsed URI."""

    scheme: Literal["s3", "gs", "file"]
    bucket: str
    """Empty for a folder."""
    path: str
    """Prefix without leading and trailing slashes, or an absolute folder."""

    def __str__(self) -> str:
        if self.scheme == "file":
            return self.path
        return f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")

    def child(self, name: str) -> BucketAddress:
        return self._replace(path=f"{self.path.rstrip('/')}/{name}" if self.path else name)


def parse(uri: str) -> BucketAddress:
    """Parse a URI. A folder may be relative and may begin with `~`.

    Raises:
        BucketError: unknown scheme, or no bucket name.
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
        raise BucketError(f"{uri!r} is not the address of a bucket or folder", hint=VALID)
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


def connect(place: BucketAddress, patience: Patience, *, opening: bool = False) -> ObjectStore:
    """Return a store whose keys are relative to `place`. No request is sent to a bucket yet.

    Args:
        place: the address.
        patience: the timeouts.
        opening: use the shorter timeouts of a first request.

    Raises:
        BucketError: a folder cannot be created, or credentials are incomplete.
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
                credential_provider=credentials_file(),
            )
        if place.scheme == "gs":
            return GCSStore(
                place.bucket, prefix=place.path or None, client_options=client, retry_config=retry
            )
        return LocalStore(place.path, mkdir=True)
    except (BaseError, OSError, ValueError) as error:
        raise sort_fault(error, f"open {place}", opening=True) from None


class CredentialsFile:
    """Credentials of one profile in the file that `aws configure` writes; read anew whenever obstore asks."""

    def __init__(self, path: Path, profile: str) -> None:
        self._path = path
        self._profile = profile

    def __call__(self) -> S3Credential:
        """Return the current credentials.

        Raises:
            OSError, ValueError: the file cannot be read, or lacks the profile or one of its keys. The message quotes no value.
        """
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(self._path.read_text())
        except configparser.Error:
            raise ValueError(f"{self._path} is not a credentials file") from None
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
            "expires_at": datetime.now(UTC) + CREDENTIALS_LIFETIME,
        }


def credentials_file(environ: Mapping[str, str] = os.environ) -> CredentialsFile | None:
    """Return the credentials file that AWS's own tools would read.

    Returns:
        None if the environment or the machine provides the credentials.

    Raises:
        OSError, ValueError: the environment names a file or profile that is missing or incomplete.
    """
    if environ.get("AWS_ACCESS_KEY_ID") or environ.get("AWS_SECRET_ACCESS_KEY"):
        return None
    named = environ.get("AWS_SHARED_CREDENTIALS_FILE")
    path = Path(named or "~/.aws/credentials").expanduser()
    profile = environ.get("AWS_PROFILE")
    found = CredentialsFile(path, profile or "default")
    try:
        found()
    except (OSError, ValueError):
        if named or profile:
            raise
        return None
    return found


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


def _retry(total_s: float) -> RetryConfig:
    # The backoff grows from 0.1 s to its maximum, so that the timeout ends the retries before the limit of 30 does.
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

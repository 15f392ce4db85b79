"""AWS credentials out of a file that may be rewritten while we run, so that expired ones can come back.

What stands in the environment cannot change in a live process; a file can, and tools that hand out
temporary credentials (`aws configure export-credentials`, saml2aws, a cron job) write it.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

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

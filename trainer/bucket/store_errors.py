"""Errors of object stores, sorted into those that need the user and those that may pass by themselves.

The stores' own messages quote the whole response, and a response about an expired token quotes the token. So our
messages contain only the status, the error code and the state of the connection.
"""

from __future__ import annotations

import errno
import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from trainer.errors import BucketError, Unavailable, UserError

MISSING_BUCKET = {"NoSuchBucket"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
UNKNOWN_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"}
TRANSIENT = {
    "RequestTimeout",
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "NoSuchUpload",
}
FORBIDDEN_STATUS = {"401", "403"}
BUSY_STATUS = {"408", "429"}
REFUSED_BY_FOLDER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
NO_CREDENTIALS = (  # from obstore's messages while it looks for credentials, never about the bucket itself
    "Missing AccessKeyId",
    "Missing SecretAccessKey",
    "has no aws_",
    "has no credentials of profile",
    "is not a credentials file",
    "169.254.169.254",
    "169.254.170.",
    "metadata.google.internal",
    "service account file",
    "oauth2.googleapis.com",
)
HOW_TO_GIVE_CREDENTIALS = (
    "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, for s3://;"
    " GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login` for gs://"
)


def ignores_ranges(error: Exception) -> bool:
    """Return whether the server answered a range request with the whole object (status 200 instead of 206)."""
    return "non-partial response" in str(error)


def no_such_bucket(error: Exception) -> bool:
    """Return whether a "not found" error is about the bucket, not the key."""
    return _code(str(error)) in MISSING_BUCKET


def sort_fault(error: Exception, doing: str, *, opening: bool = False) -> UserError:
    """Convert a store's error to an error for users.

    Args:
        error: obstore's error, or an OSError from a folder.
        doing: the failed operation with its address: "open s3://bucket/runs".
        opening: no request has succeeded yet. Then an error while obtaining credentials means that there are none.

    Returns:
        BucketError if the user must do something, Unavailable if a retry may succeed.
    """
    text = str(error).partition("\n\nDebug source:")[0]
    code = _code(text)
    status = _first(r"status code: (\d{3})", text)
    cannot = f"cannot {doing}: {_reason(text, code, status)}"
    hint = _hint_for_user(error, text, code, status, opening=opening)
    return BucketError(cannot, hint=hint) if hint else Unavailable(cannot, hint=_hint_for_retry(text))


def _hint_for_user(error: Exception, text: str, code: str, status: str, *, opening: bool) -> str | None:
    """Return what the user must do about the error; None if it may pass by itself."""
    forbidden = isinstance(error, PermissionDeniedError) or status in FORBIDDEN_STATUS
    unknown = isinstance(error, UnauthenticatedError) or code in UNKNOWN_CREDENTIALS
    elsewhere = code == "AuthorizationHeaderMalformed" or status == "301" or "configured region" in text
    refused = status.startswith("4") and status not in BUSY_STATUS and code not in TRANSIENT
    hints = (  # the first whose condition holds
        (opening and any(sign in text for sign in NO_CREDENTIALS), HOW_TO_GIVE_CREDENTIALS),
        (code in MISSING_BUCKET, "there is no such bucket: create it, or correct its name"),
        (
            code in EXPIRED,
            "the credentials have expired: renew them and start again; committed checkpoints are safe",
        ),
        (unknown, "the credentials are invalid: check the access key, its secret and the session token"),
        (elsewhere, "the bucket is in another region: set AWS_REGION to it"),
        (code == "RequestTimeTooSkewed", "this machine's clock is wrong: set it"),
        (
            forbidden,
            "a permission is missing: reading, listing, writing and deleting objects must be allowed",
        ),
        (_errno(text) in REFUSED_BY_FOLDER, "choose a folder that this user can write to"),
        (refused, "the store does not accept the request: is the endpoint an S3 or GCS one?"),
    )
    return next((hint for holds, hint in hints if holds), None)


def _hint_for_retry(text: str) -> str:
    if _errno(text) == errno.ENOSPC:
        return "the disk is full: free some space"
    return "all retries failed; try again later"


def _reason(text: str, code: str, status: str) -> str:
    """Return one short line, never the body of a response."""
    if code or status:
        return " ".join(part for part in (status, code) if part)
    if match := _first(r"(HTTP error: [\w ]+)", text) or _first(r"([^<\n]+ \(os error \d+\))", text):
        return match.strip().removeprefix("Generic ")
    return text.partition("\n")[0].partition("<")[0][:200]


def _code(text: str) -> str:
    return _first(r"<Code>(\w+)</Code>", text)


def _errno(text: str) -> int:
    return int(_first(r"(?:os error |\[Errno )(\d+)", text) or 0)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""

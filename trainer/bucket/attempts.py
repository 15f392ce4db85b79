"""Attempts and who owns a run: the attempt with the highest number under `attempts/`.

Most stores support conditional writes (S3 If-None-Match, GCS generation match, O_EXCL in folders). On these, each number
belongs to one attempt for ever.

On other stores, two attempts can claim the same number at the same moment. Then the later write owns the number. The
other attempt notices when it next reads the claim, which it does right after claiming and before each commit and
deletion. A race remains between such a read and the write that follows it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from trainer.bucket.layout import ATTEMPTS_PREFIX, attempt_key, claimed_attempt
from trainer.bucket.store import Bucket
from trainer.errors import Superseded

NEWER_CONTINUES = "the newer attempt continues from the newest commit; nothing needs to be done here"
NOT_EXCLUSIVE = (
    "this store does not support conditional writes: two controllers that start at the same moment can both own the"
    " run; a later one still supersedes an earlier one"
)
"""The warning that users get about an attempt that is not `exclusive`."""


class Attempt:
    """One attempt at a run. It owns the run until a newer attempt claims it."""

    def __init__(self, bucket: Bucket, number: int, *, token: str = "", exclusive: bool = True) -> None:
        self._bucket = bucket
        self._token = token
        self.number = number
        self.exclusive = exclusive
        """Whether the store gives each number to one attempt only."""

    @property
    def token(self) -> str:
        """A random token that distinguishes this attempt's claim from another claim of the same number."""
        return self._token

    def check(self) -> None:
        """Check that this attempt still owns the run. Call it before each commit and each deletion.

        Raises:
            Superseded: a newer attempt has claimed the run.
        """
        newest = _newest(self._bucket)
        if newest > self.number:
            raise Superseded(
                f"attempt {self.number} of run {self._bucket.run_id} is superseded by attempt {newest}",
                hint=NEWER_CONTINUES,
            )
        if not self.exclusive and not _is_ours(self._bucket, self.number, self._token):
            raise Superseded(
                f"attempt {self.number} of run {self._bucket.run_id} was claimed by another at the same moment",
                hint=NEWER_CONTINUES,
            )


def claim(bucket: Bucket, about: Mapping[str, Any]) -> Attempt:
    """Claim the run for a new attempt, which supersedes any earlier one.

    Args:
        bucket: the run's.
        about: facts about this attempt for users: node, shape.
    """
    token = uuid.uuid4().hex
    number = _newest(bucket) + 1
    while (exclusive := _write_claim(bucket, number, token, about)) is None:  # another attempt was faster
        number = max(number, _newest(bucket)) + 1
    return Attempt(bucket, number, token=token, exclusive=exclusive)


def _write_claim(bucket: Bucket, number: int, token: str, about: Mapping[str, Any]) -> bool | None:
    """Write our claim of a number.

    Returns:
        Whether the store then refuses other claims of the number; None if the number belongs to another attempt.
    """
    body = {"attempt": number, "claimed": datetime.now(UTC).isoformat(), "token": token, **about}
    data = json.dumps(body, indent=2, default=str).encode()
    # An existing claim may be ours, from a try whose answer was lost.
    if not bucket.create(attempt_key(number), data) and not _is_ours(bucket, number, token):
        return None
    exclusive = bucket.keeps_first(attempt_key(number), data)
    return exclusive if exclusive or _is_ours(bucket, number, token) else None


def _is_ours(bucket: Bucket, number: int, token: str) -> bool:
    try:
        return bool(json.loads(bucket.get(attempt_key(number)))["token"] == token)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _newest(bucket: Bucket) -> int:
    numbers = (claimed_attempt(object_.key) for object_ in bucket.list(ATTEMPTS_PREFIX))
    return max((number for number in numbers if number is not None), default=0)

"""Attempts: who owns a run. The highest number under `attempts/` does.

Where the store takes a condition (S3 If-None-Match, GCS generation match, O_EXCL in folders), a number
has one owner for ever. Where it does not, of two that claim a number at the same moment the later
write owns it; the other finds out as soon as it looks at the card again, which it does right after
its claim and before each commit and deletion. What remains open is the moment between look and write.
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

NEWER_GOES_ON = "the newer attempt goes on from the newest commit; nothing is left to do here"
NOT_EXCLUSIVE = (
    "this store takes no conditional create: two controllers started at the same moment could both believe"
    " that they own the run; a later one still supersedes an earlier one"
)
"""What people are told of an attempt that is not `exclusive`."""


class Attempt:
    """One attempt at a run: the owner until a newer one claims the run."""

    def __init__(self, bucket: Bucket, number: int, *, token: str = "", exclusive: bool = True) -> None:
        self._bucket = bucket
        self._token = token
        self.number = number
        self.exclusive = exclusive
        """Whether the store gives a number to one attempt only, whenever they start."""

    @property
    def token(self) -> str:
        """What tells this attempt's card from another's of the same number."""
        return self._token

    def check(self) -> None:
        """See that the run is still ours; to be asked before each commit and each deletion.

        Raises:
            Superseded: a newer attempt has claimed the run.
        """
        newest = _newest(self._bucket)
        if newest > self.number:
            raise Superseded(
                f"attempt {self.number} of run {self._bucket.run_id} is superseded by attempt {newest}",
                hint=NEWER_GOES_ON,
            )
        if not self.exclusive and not _is_ours(self._bucket, self.number, self._token):
            raise Superseded(
                f"attempt {self.number} of run {self._bucket.run_id} was claimed by another at the same moment",
                hint=NEWER_GOES_ON,
            )


def claim(bucket: Bucket, about: Mapping[str, Any]) -> Attempt:
    """Take the run over from whoever has it.

    Args:
        bucket: the run's.
        about: what people should see of this attempt: node, shape.
    """
    token = uuid.uuid4().hex
    number = _newest(bucket) + 1
    while (exclusive := _take(bucket, number, token, about)) is None:  # somebody was faster
        number = max(number, _newest(bucket)) + 1
    return Attempt(bucket, number, token=token, exclusive=exclusive)


def _take(bucket: Bucket, number: int, token: str, about: Mapping[str, Any]) -> bool | None:
    """Put our card there; whether the store then refuses another one, or None if the number is not ours."""
    card = {"attempt": number, "claimed": datetime.now(UTC).isoformat(), "token": token, **about}
    data = json.dumps(card, indent=2, default=str).encode()
    # A card that was there already may be ours, from a try whose answer was lost.
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

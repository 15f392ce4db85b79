"""Attempts: who owns a run. The highest number under `attempts/` does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from trainer.bucket.store import Bucket
from trainer.errors import Superseded

PREFIX = "attempts/"


class Attempt:
    """One attempt at a run: the owner until a newer one claims the run."""

    def __init__(self, bucket: Bucket, number: int) -> None:
        self._bucket = bucket
        self.number = number

    def check(self) -> None:
        """See that the run is still ours; to be asked before each commit and each deletion.

        Raises:
            Superseded: a newer attempt has claimed the run.
        """
        newest = _newest(self._bucket)
        if newest > self.number:
            raise Superseded(
                f"attempt {self.number} of run {self._bucket.run_id} is superseded by attempt {newest}",
                hint="the newer attempt goes on from the newest commit; nothing is left to do here",
            )


def claim(bucket: Bucket, about: Mapping[str, Any]) -> Attempt:
    """Take the run over from whoever has it.

    Args:
        bucket: the run's.
        about: what people should see of this attempt: node, shape.
    """
    number = _newest(bucket) + 1
    while not bucket.create(f"{PREFIX}{number:04d}.json", _card(number, about)):
        # Somebody was faster, or our own answer was lost: a number that is skipped harms nobody.
        number = max(number, _newest(bucket)) + 1
    return Attempt(bucket, number)


def _card(number: int, about: Mapping[str, Any]) -> bytes:
    card = {"attempt": number, "claimed": datetime.now(UTC).isoformat(), **about}
    return json.dumps(card, indent=2, default=str).encode()


def _newest(bucket: Bucket) -> int:
    numbers = (re.fullmatch(rf"{PREFIX}(\d+)\.json", object_.key) for object_ in bucket.list(PREFIX))
    return max((int(match[1]) for match in numbers if match), default=0)

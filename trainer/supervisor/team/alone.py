"""One machine, which is what most runs have."""

from __future__ import annotations

from pathlib import Path

from trainer.bucket import Bucket
from trainer.bucket.attempt import Attempt
from trainer.bucket.parts import Node
from trainer.bucket.restore import Restored, Tell, restore
from trainer.bucket.store import nobody
from trainer.errors import ExitCode
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.messages import Terms
from trainer.supervisor.team.protocol import Reject
from trainer.supervisor.workers import Meeting


class Alone:
    """A team that agrees with itself."""

    node = Node()
    terms: Terms | None = None
    meeting: Meeting | None = None
    broken: str | None = None
    noticed: str | None = None

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def begin(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None: ...

    def restore(self, bucket: Bucket, into: Path, reject: Reject, tell: Tell = nobody) -> Restored | None:
        return restore(bucket, into, reject, tell=tell)

    def notice(self, source: str) -> None: ...

    def ended(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        return exit_code, outcome

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:  # noqa: ARG002
        return code

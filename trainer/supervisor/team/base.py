"""What a supervisor asks of those that it trains with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trainer.bucket import Bucket
from trainer.bucket.attempts import Attempt
from trainer.bucket.node_parts import Node
from trainer.bucket.restore import Restored, Tell, restore
from trainer.bucket.store import ignore_progress
from trainer.errors import ExitCode
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.connection import Terms
from trainer.supervisor.workers import Meeting

Reject = Callable[[int, str], None]


class Team(Protocol):
    """One machine alone, the first of several, or another of them."""

    node: Node
    shape: Shape
    """Of all nodes together, as far as this one knows."""
    terms: Terms | None
    """What node 0 has decided; None where this node decides."""

    @property
    def meeting(self) -> Meeting | None:
        """Where the ranks of several nodes meet; None: on this machine."""
        ...

    @property
    def broken(self) -> str | None:
        """Why the attempt cannot go on, as far as other nodes are concerned."""
        ...

    @property
    def noticed(self) -> str | None:
        """What gave another node notice that it is about to go."""
        ...

    def begin(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None:
        """The run is claimed, and this is how it is trained; `predicted` bytes of a checkpoint."""
        ...

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, tell: Tell = ignore_progress
    ) -> Restored | None:
        """The same checkpoint on every node, of which this one has its copy; all nodes are ready when it returns.

        Raises:
            Unavailable: a node is gone.
            CorruptCheckpoint, BucketError, Unavailable: as `trainer.bucket.restore`.
        """
        ...

    def notice(self, source: str) -> None:
        """This machine is about to go."""
        ...

    def ended(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        """This node's workers have ended so: how those of all nodes have, as far as that is known."""
        ...

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:
        """The attempt is over for this node: its exit code. Nothing is said after it."""
        ...


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

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, tell: Tell = ignore_progress
    ) -> Restored | None:
        return restore(bucket, into, reject, tell=tell)

    def notice(self, source: str) -> None: ...

    def ended(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        return exit_code, outcome

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:  # noqa: ARG002
        return code

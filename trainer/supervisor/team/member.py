"""Any node but the first: does what node 0 says."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from trainer.bucket import Bucket
from trainer.bucket.attempts import Attempt
from trainer.bucket.node_parts import Node
from trainer.bucket.restore import CorruptCheckpoint, Restored, Tell, restore_named
from trainer.bucket.store import ignore_progress
from trainer.errors import ExitCode, Unavailable, UserError
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.base import Reject
from trainer.supervisor.team.connection import End, Ended, Hello, Link, Noticed, Ready, Restoring, Terms
from trainer.supervisor.team.leader import PATIENCE_S, POLL_S
from trainer.supervisor.team.position import Position
from trainer.supervisor.workers import Meeting

log = logging.getLogger(__name__)
RETRY_S = 0.5


class Dismissed(UserError):
    """Node 0 has ended the attempt; with its exit code."""

    def __init__(self, end: End) -> None:
        super().__init__(end.message or "node 0 has ended the attempt", hint=end.hint)
        self.exit_code = ExitCode(end.exit_code)


class Member:
    """The team, from any other node."""

    noticed: str | None = None

    def __init__(self, position: Position, shape: Shape) -> None:
        self.node = Node(position.rank, position.nodes)
        self.shape = shape
        self.terms: Terms | None = None
        self._position = position
        self._link: Link | None = None
        self._dismissed: End | None = None
        self._took_part = False

    def meet(self, run: str, given_up: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Find node 0, say what this node is, and hear what to do.

        Raises:
            Unavailable: node 0 is not there, or goes.
            Dismissed: it has no use for this node.
        """
        self._link = Link(self._connect(given_up, patience_s), "node 0")
        self._link.say(Hello(run=run, node=self.node.rank, shape=self.shape))
        while (terms := self._link.take(Terms)) is None:
            self._check()
            if given_up():
                self._there.say(End(exit_code=ExitCode.RECOVER, message="its machine goes"))
                raise Unavailable("this machine goes before the nodes have found each other")
            time.sleep(POLL_S)
        self.terms, self.shape = terms, terms.shape

    def _connect(self, given_up: Callable[[], bool], patience_s: float) -> socket.socket:
        address = (self._position.address, self._position.port)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return socket.create_connection(address, timeout=5.0)
            except OSError as error:
                if given_up() or time.monotonic() > deadline:
                    raise Unavailable(
                        f"node 0 does not answer at {address[0]}:{address[1]}: {error}",
                        hint="look at node 0's log, and at the network between the nodes",
                    ) from None
                time.sleep(RETRY_S)

    @property
    def _there(self) -> Link:
        if self._link is None:
            raise RuntimeError("the nodes have not met yet")
        return self._link

    @property
    def meeting(self) -> Meeting | None:
        if self.terms is None:
            return None
        return Meeting(self._position.address, self.terms.port, self.node.rank)

    def begin(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None:
        """Node 0 has begun already."""

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, tell: Tell = ignore_progress
    ) -> Restored | None:
        """The checkpoint that node 0 names; brought while node 0 brings its own copy."""
        restored: Restored | None = None
        while True:
            named = self._wait_for_restoring()
            if named.step is None:
                restored = None
            elif restored is None or (restored.manifest.step, restored.manifest.attempt) != (
                named.step,
                named.attempt,
            ):
                restored = self._bring(bucket, named, into, reject, tell)
            if named.sure:
                break
        self._there.say(Ready())
        while not self._there.take(Ready):
            self._check()
            time.sleep(POLL_S)
        return restored

    def _bring(
        self, bucket: Bucket, named: Restoring, into: Path, reject: Reject, tell: Tell
    ) -> Restored | None:
        """A copy that does not verify is no loss while node 0 may still reject it too.

        Raises:
            CorruptCheckpoint: it is sure that it verified there.
        """
        try:
            return restore_named(bucket, named.step or 0, named.attempt, into, tell)
        except CorruptCheckpoint as error:
            if named.sure:
                raise Unavailable(f"{error.message}, and at node 0 it verified") from None
            reject(named.step or 0, error.message)
            return None

    def _wait_for_restoring(self) -> Restoring:
        while (named := self._there.take(Restoring)) is None:
            self._check()
            time.sleep(POLL_S)
        return named

    def _check(self) -> None:
        """Raise if node 0 has ended the attempt, or is gone."""
        broken = self.broken
        if self._dismissed:
            raise Dismissed(self._dismissed)
        if broken:
            raise Unavailable(f"{broken}; node 0 leads, so this attempt is over")

    @property
    def broken(self) -> str | None:
        self._dismissed = self._dismissed or self._there.take(End)
        return "node 0 has ended the attempt" if self._dismissed else self._there.gone

    def notice(self, source: str) -> None:
        self._there.say(Noticed(source=source))

    def ended(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        self._there.say(Ended(exit_code=exit_code, outcome=outcome))
        self._took_part = True
        return exit_code, outcome

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:
        """What node 0 says; without it, that this attempt can be recovered."""
        if self._link is None:
            return code
        if self._took_part:
            while self.broken is None:
                time.sleep(POLL_S)
        else:  # node 0 must know that this node cannot go on
            self._link.say(End(exit_code=code, message=message or "its machine goes", hint=hint))
        self._link.close()
        if self._dismissed:
            log.info("node 0 has ended the attempt with exit code %d", self._dismissed.exit_code)
            return ExitCode(self._dismissed.exit_code)
        if not self._took_part:
            return code
        log.error("%s", self._link.gone)
        return ExitCode.RECOVER

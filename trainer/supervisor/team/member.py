"""Every node of a team except node 0: connects to node 0 and follows its decisions."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from trainer.bucket import Bucket
from trainer.bucket.attempts import Attempt
from trainer.bucket.byte_streams import ignore_progress
from trainer.bucket.commit import Node
from trainer.bucket.restore import CorruptCheckpoint, Progress, Restored, restore_named
from trainer.errors import ExitCode, Unavailable, UserError
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.base import Position, Reject
from trainer.supervisor.team.connection import (
    AttemptEnded,
    Hello,
    Link,
    Noticed,
    Ready,
    Restoring,
    Terms,
    WorkersEnded,
)
from trainer.supervisor.team.leader import CONNECT_TIMEOUT_S, POLL_S
from trainer.supervisor.workers import Rendezvous

log = logging.getLogger(__name__)
RETRY_S = 0.5


class EndedByLeader(UserError):
    """Node 0 has ended the attempt. The exit code is node 0's."""

    def __init__(self, end: AttemptEnded) -> None:
        super().__init__(end.message or "node 0 has ended the attempt", hint=end.hint)
        self.exit_code = ExitCode(end.exit_code)


class Member:
    """The team as a node other than node 0 sees it."""

    peer_notice: str | None = None

    def __init__(self, position: Position, shape: Shape) -> None:
        self.node = Node(position.rank, position.nodes)
        self.shape = shape
        self.terms: Terms | None = None
        self._position = position
        self._link: Link | None = None
        self._end: AttemptEnded | None = None
        self._reported = False  # whether node 0 knows how this node's workers ended

    def connect(self, run: str, give_up: Callable[[], bool], timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect to node 0, introduce this node, and wait for the terms of the attempt.

        Raises:
            Unavailable: node 0 does not answer or is lost, or this machine is about to be preempted.
            EndedByLeader: node 0 turned this node away.
        """
        self._link = Link(self._open_connection(give_up, timeout_s), "node 0")
        self._link.send(Hello(run=run, node=self.node.rank, shape=self.shape))
        while (terms := self._link.take(Terms)) is None:
            self._check()
            if give_up():
                self._leader.send(
                    AttemptEnded(exit_code=ExitCode.RECOVER, message="its machine is being preempted")
                )
                raise Unavailable("this machine is being preempted before all nodes have connected")
            time.sleep(POLL_S)
        self.terms, self.shape = terms, terms.shape

    def _open_connection(self, give_up: Callable[[], bool], timeout_s: float) -> socket.socket:
        address = (self._position.address, self._position.port)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return socket.create_connection(address, timeout=5.0)
            except OSError as error:
                if give_up() or time.monotonic() > deadline:
                    raise Unavailable(
                        f"node 0 does not answer at {address[0]}:{address[1]}: {error}",
                        hint="check node 0's log, and the network between the nodes",
                    ) from None
                time.sleep(RETRY_S)

    @property
    def _leader(self) -> Link:
        if self._link is None:
            raise RuntimeError("this node has not connected to node 0 yet")
        return self._link

    @property
    def rendezvous(self) -> Rendezvous | None:
        if self.terms is None:
            return None
        return Rendezvous(self._position.address, self.terms.port, self.node.rank)

    def announce(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None:
        """Send nothing. Node 0 has announced the attempt already."""

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, progress: Progress = ignore_progress
    ) -> Restored | None:
        """Fetch the checkpoint that node 0 names, while node 0 fetches its own copy."""
        restored: Restored | None = None
        while True:
            named = self._wait_for_restoring()
            if named.step is None:
                restored = None
            elif restored is None or (restored.manifest.step, restored.manifest.attempt) != (
                named.step,
                named.attempt,
            ):
                restored = self._fetch(bucket, named, into, reject, progress)
            if named.sure:
                break
        self._leader.send(Ready())
        while not self._leader.take(Ready):
            self._check()
            time.sleep(POLL_S)
        return restored

    def _fetch(
        self, bucket: Bucket, named: Restoring, into: Path, reject: Reject, progress: Progress
    ) -> Restored | None:
        """Fetch a checkpoint. Return None if it does not verify while node 0 may still reject it too.

        Raises:
            Unavailable: it does not verify here, but it did on node 0.
        """
        try:
            return restore_named(bucket, named.step or 0, named.attempt, into, progress)
        except CorruptCheckpoint as error:
            if named.sure:
                raise Unavailable(f"{error.message}, although it verified on node 0") from None
            reject(named.step or 0, error.message)
            return None

    def _wait_for_restoring(self) -> Restoring:
        while (named := self._leader.take(Restoring)) is None:
            self._check()
            time.sleep(POLL_S)
        return named

    def _check(self) -> None:
        """Raise if node 0 has ended the attempt or is lost."""
        failure = self.failure
        if self._end:
            raise EndedByLeader(self._end)
        if failure:
            raise Unavailable(f"{failure}; without node 0 this attempt cannot continue")

    @property
    def failure(self) -> str | None:
        self._end = self._end or self._leader.take(AttemptEnded)
        return "node 0 has ended the attempt" if self._end else self._leader.lost

    def send_notice(self, source: str) -> None:
        self._leader.send(Noticed(source=source))

    def combine_outcomes(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        self._leader.send(WorkersEnded(exit_code=exit_code, outcome=outcome))
        self._reported = True
        return exit_code, outcome

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:
        """Return node 0's exit code. If node 0 is lost, return the code that asks for a recovery."""
        if self._link is None:
            return code
        if self._reported:
            while self.failure is None:  # node 0 decides, after its commit
                time.sleep(POLL_S)
        else:  # node 0 must learn that this node does not continue
            text = message or "its machine is being preempted"
            self._link.send(AttemptEnded(exit_code=code, message=text, hint=hint))
        self._link.close()
        if self._end:
            log.info("node 0 has ended the attempt with exit code %d", self._end.exit_code)
            return ExitCode(self._end.exit_code)
        if not self._reported:
            return code
        log.error("%s", self._link.lost)
        return ExitCode.RECOVER

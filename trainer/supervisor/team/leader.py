"""Node 0: waits for the others, tells them what to do, and sees when one is gone."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path

from trainer.bucket import Bucket
from trainer.bucket.attempts import Attempt
from trainer.bucket.manifest import Manifest
from trainer.bucket.node_parts import Node
from trainer.bucket.restore import Restored, Tell, restore
from trainer.bucket.store import ignore_progress
from trainer.errors import ExitCode, NoFit, Unavailable, UserError
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.base import Reject
from trainer.supervisor.team.connection import (
    End,
    Ended,
    Hello,
    Link,
    Message,
    Noticed,
    Ready,
    Restoring,
    Terms,
)
from trainer.supervisor.team.position import Position
from trainer.supervisor.workers import GRACE_S, Meeting, meeting

PATIENCE_S = 15 * 60.0
"""For the other nodes to come: those of a cluster run the same command when all are set up."""
POLL_S = 0.1


class Leader:
    """The team, from node 0."""

    terms: Terms | None = None

    def __init__(self, position: Position, shape: Shape, *, grace_s: float = GRACE_S) -> None:
        self.node = Node(0, position.nodes)
        self.shape = shape
        self.meeting: Meeting | None = None
        self._position = position
        self._grace_s = grace_s
        self._links: dict[int, Link] = {}
        self._ended: dict[int, Ended] = {}
        self._failed_at: float | None = None
        self._noticed: str | None = None
        self._lost: str | None = None

    def meet(self, run: str, given_up: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Wait until every node has come.

        Args:
            run: digest that every node of this run knows.
            given_up: asked again and again; True ends the wait.
            patience_s: seconds to wait in all.

        Raises:
            Unavailable: one did not come, or this machine is about to go.
            NoFit: the nodes are not alike.
            UserError: the port is taken.
        """
        deadline = time.monotonic() + patience_s
        strangers: list[Link] = []
        with self._listen() as server:
            try:
                while missing := set(range(1, self.node.nodes)) - set(self._links):
                    if given_up():
                        raise Unavailable("this machine goes before the nodes have found each other")
                    if time.monotonic() > deadline:
                        raise self._missed(missing, patience_s)
                    with contextlib.suppress(TimeoutError):
                        strangers.append(Link(server.accept()[0], "a node that has not said its name"))
                    strangers = [link for link in strangers if not self._welcome(link, run) and not link.gone]
            finally:
                for link in strangers:
                    if link not in self._links.values():
                        link.close()

    def _missed(self, missing: set[int], patience_s: float) -> Unavailable:
        return Unavailable(
            f"node {', '.join(map(str, sorted(missing)))} of {self.node.nodes} did not come to "
            f"{self._position.address}:{self._position.port} within {patience_s:.0f} s",
            hint="look at that node's log, and at the network between the nodes",
        )

    def _listen(self) -> socket.socket:
        address, port = self._position.address, self._position.port
        try:
            try:
                server = socket.create_server((address, port))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                server = socket.create_server(("", port))  # an address that is ours behind a translation only
        except OSError as error:
            raise UserError(
                f"cannot listen for the other nodes at {address}:{port}: {error.strerror}",
                hint="choose another MASTER_PORT",
            ) from None
        server.settimeout(0.2)
        return server

    def _welcome(self, link: Link, run: str) -> bool:
        """Whether a connection has said who it is, and is dealt with."""
        hello = link.take(Hello)
        if hello is None:
            return False
        link.peer = f"node {hello.node}"
        if hello.run != run:
            link.say(
                End(exit_code=ExitCode.CONFIG, message="node 0 trains another run, or the recipe differs")
            )
            link.close()
            return True
        if earlier := self._links.pop(hello.node, None):  # it was started again
            earlier.close()
        self._links[hello.node] = link
        mine, theirs = self.shape, hello.shape
        if (mine.accelerator, mine.count) != (theirs.accelerator, theirs.count):
            raise NoFit(
                f"the nodes are not alike: {mine.one_node} is node 0, {theirs.one_node} is node {hello.node}",
                hint="name one accelerator for all nodes",
            )
        self.shape = _both(mine, theirs, self.node.nodes)
        return True

    def begin(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None:
        """Tell all nodes that the run is claimed, and how it is trained."""
        self.meeting = Meeting(self._position.address, meeting().port, 0)
        terms = Terms(
            attempt=attempt.number,
            token=attempt.token,
            exclusive=attempt.exclusive,
            fit=fit,
            shape=self.shape,
            port=self.meeting.port,
            predicted=predicted,
        )
        self._tell(terms)

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, tell: Tell = ignore_progress
    ) -> Restored | None:
        """The newest checkpoint that verifies here, which all nodes then have."""
        restored = restore(
            bucket, into, reject, trying=lambda manifest: self._tell(_restoring(manifest)), tell=tell
        )
        self._tell(_restoring(restored.manifest if restored else None, sure=True))
        for number, link in self._links.items():
            while not link.take(Ready):
                if broken := self.broken:
                    raise Unavailable(f"{broken}, before training began")
                if self.noticed:  # it will not be ready
                    raise Unavailable(f"node {number} goes before training began")
                time.sleep(POLL_S)
        self._tell(Ready())
        return restored

    @property
    def broken(self) -> str | None:
        """A node is gone or has given up; or its workers have failed, and ours had time to see it themselves."""
        self._hear()
        failed = [number for number, ended in self._ended.items() if ended.exit_code]
        if self._lost is None and failed:
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at >= self._grace_s:
                self._lost = f"the workers of node {failed[0]} have failed"
        return self._lost

    @property
    def noticed(self) -> str | None:
        self._hear()
        return self._noticed

    def _hear(self) -> None:
        """Take what the other nodes have said since the last look."""
        for number, link in self._links.items():
            if ended := link.take(Ended):
                self._ended[number] = ended
            if notice := link.take(Noticed):
                self._noticed = f"{notice.source} on {link.peer}"
            if end := link.take(End):
                self._lost = self._lost or f"{link.peer} has given up: {end.message}"
            self._lost = self._lost or link.gone

    def notice(self, source: str) -> None:
        """Nothing to tell: the ranks agree on a stop among themselves."""

    def ended(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        """Ours, or what explains it: a rank whose partner is gone ends with an error that says little."""
        if outcome is not None:
            return exit_code, outcome
        deadline = time.monotonic() + self._grace_s
        while not self.broken and len(self._ended) < len(self._links) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        theirs = list(self._ended.values())
        for each in theirs:
            if each.outcome and each.outcome.explains:
                return each.exit_code, each.outcome
        return min([exit_code, *(each.exit_code for each in theirs)]), None  # a signal is negative

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:
        self._tell(End(exit_code=code, message=message, hint=hint))
        for link in self._links.values():
            link.close()
        return code

    def _tell(self, message: Message) -> None:
        for link in self._links.values():
            link.say(message)


def _restoring(manifest: Manifest | None, *, sure: bool = False) -> Restoring:
    if manifest is None:
        return Restoring(sure=sure)
    return Restoring(step=manifest.step, attempt=manifest.attempt, sure=sure)


def _both(mine: Shape, theirs: Shape, nodes: int) -> Shape:
    """What every node has, at least."""
    memory = [each.memory_gib for each in (mine, theirs) if each.memory_gib is not None]
    return mine.model_copy(
        update={
            "nodes": nodes,
            "memory_gib": min(memory, default=None),
            "cores": min(mine.cores, theirs.cores),
            "host_memory_gib": min(mine.host_memory_gib, theirs.host_memory_gib),
        }
    )

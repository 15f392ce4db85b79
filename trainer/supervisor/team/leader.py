"""Node 0 of a team: accepts the other nodes, sends them the decisions, and detects when one is lost."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path

from trainer.bucket import Bucket
from trainer.bucket.attempts import Attempt
from trainer.bucket.byte_streams import ignore_progress
from trainer.bucket.commit import Node
from trainer.bucket.manifest import Manifest
from trainer.bucket.restore import Progress, Restored, restore
from trainer.errors import ExitCode, NoFit, Unavailable, UserError
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.base import Position, Reject
from trainer.supervisor.team.connection import (
    AttemptEnded,
    Hello,
    Link,
    Message,
    Noticed,
    Ready,
    Restoring,
    Terms,
    WorkersEnded,
)
from trainer.supervisor.workers import GRACE_S, Rendezvous, choose_rendezvous

CONNECT_TIMEOUT_S = 15 * 60.0
"""How long to wait for the other nodes. The nodes of a cluster start the same command once all of them are set up."""
POLL_S = 0.1


class Leader:
    """The team as node 0 sees it."""

    terms: Terms | None = None

    def __init__(self, position: Position, shape: Shape, *, grace_s: float = GRACE_S) -> None:
        self.node = Node(0, position.nodes)
        self.shape = shape
        self.rendezvous: Rendezvous | None = None
        self._position = position
        self._grace_s = grace_s
        self._links: dict[int, Link] = {}
        self._ended: dict[int, WorkersEnded] = {}
        self._failed_at: float | None = None
        self._peer_notice: str | None = None
        self._failure: str | None = None

    def connect(self, run: str, give_up: Callable[[], bool], timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Wait until every other node has connected.

        Args:
            run: digest that every node of this run computes.
            give_up: polled while waiting; True ends the wait.
            timeout_s: seconds to wait in all.

        Raises:
            Unavailable: a node did not connect in time, or this machine is about to be preempted.
            NoFit: the nodes have different GPUs.
            UserError: the port is in use.
        """
        deadline = time.monotonic() + timeout_s
        pending: list[Link] = []  # connected, but not yet introduced by a Hello
        with self._listen() as server:
            try:
                while missing := set(range(1, self.node.nodes)) - set(self._links):
                    if give_up():
                        raise Unavailable("this machine is being preempted before all nodes have connected")
                    if time.monotonic() > deadline:
                        raise self._missing_nodes(missing, timeout_s)
                    with contextlib.suppress(TimeoutError):
                        pending.append(Link(server.accept()[0], "a node that has not introduced itself"))
                    pending = [link for link in pending if not self._admit(link, run) and not link.lost]
            finally:
                for link in pending:
                    if link not in self._links.values():
                        link.close()

    def _missing_nodes(self, missing: set[int], timeout_s: float) -> Unavailable:
        return Unavailable(
            f"node {', '.join(map(str, sorted(missing)))} of {self.node.nodes} did not connect to "
            f"{self._position.address}:{self._position.port} within {timeout_s:.0f} s",
            hint="check that node's log, and the network between the nodes",
        )

    def _listen(self) -> socket.socket:
        address, port = self._position.address, self._position.port
        try:
            try:
                server = socket.create_server((address, port))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                # Behind address translation (NAT) no local interface has the address.
                server = socket.create_server(("", port))
        except OSError as error:
            raise UserError(
                f"cannot listen for the other nodes at {address}:{port}: {error.strerror}",
                hint="choose another MASTER_PORT",
            ) from None
        server.settimeout(0.2)
        return server

    def _admit(self, link: Link, run: str) -> bool:
        """Admit a node that has introduced itself, or turn it away.

        Returns:
            False while the node has not introduced itself.
        """
        hello = link.take(Hello)
        if hello is None:
            return False
        link.peer = f"node {hello.node}"
        if hello.run != run:
            message = "node 0 trains another run, or the same run with another recipe"
            link.send(AttemptEnded(exit_code=ExitCode.CONFIG, message=message))
            link.close()
            return True
        if earlier := self._links.pop(hello.node, None):  # the node was restarted
            earlier.close()
        self._links[hello.node] = link
        own, other = self.shape, hello.shape
        if (own.accelerator, own.count) != (other.accelerator, other.count):
            raise NoFit(
                f"the nodes have different GPUs: node 0 has {own.one_node}, node {hello.node} has {other.one_node}",
                hint="request the same accelerator for all nodes",
            )
        self.shape = _combined(own, other, self.node.nodes)
        return True

    def announce(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None:
        self.rendezvous = Rendezvous(self._position.address, choose_rendezvous().port, 0)
        terms = Terms(
            attempt=attempt.number,
            token=attempt.token,
            exclusive=attempt.exclusive,
            fit=fit,
            shape=self.shape,
            port=self.rendezvous.port,
            predicted=predicted,
        )
        self._broadcast(terms)

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, progress: Progress = ignore_progress
    ) -> Restored | None:
        """Restore the newest checkpoint that verifies on this node, then wait until every node has it."""
        restored = restore(
            bucket,
            into,
            reject,
            trying=lambda manifest: self._broadcast(_restoring(manifest)),
            progress=progress,
        )
        self._broadcast(_restoring(restored.manifest if restored else None, sure=True))
        for number, link in self._links.items():
            while not link.take(Ready):
                if failure := self.failure:
                    raise Unavailable(f"{failure}, before training began")
                if self.peer_notice:  # that node will not become ready
                    raise Unavailable(f"node {number} is being preempted before training began")
                time.sleep(POLL_S)
        self._broadcast(Ready())
        return restored

    @property
    def failure(self) -> str | None:
        """Why the attempt cannot continue: a node is lost or has given up, or its workers have failed.

        Failed workers count only after `grace_s` seconds, so that this node's own ranks can report the error first.
        """
        self._receive()
        failed = [number for number, ended in self._ended.items() if ended.exit_code]
        if self._failure is None and failed:
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at >= self._grace_s:
                self._failure = f"the workers of node {failed[0]} have failed"
        return self._failure

    @property
    def peer_notice(self) -> str | None:
        self._receive()
        return self._peer_notice

    def _receive(self) -> None:
        """Process the messages that have arrived from the other nodes."""
        for number, link in self._links.items():
            if ended := link.take(WorkersEnded):
                self._ended[number] = ended
            if notice := link.take(Noticed):
                self._peer_notice = f"{notice.source} on {link.peer}"
            if end := link.take(AttemptEnded):
                self._failure = self._failure or f"{link.peer} has given up: {end.message}"
            self._failure = self._failure or link.lost

    def send_notice(self, source: str) -> None:
        """Send nothing. The ranks agree among themselves to stop."""

    def combine_outcomes(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        """Return this node's outcome, or the outcome of the node that explains the failure.

        A rank whose peer died fails with a network error that does not name the cause. The peer's outcome names it.
        """
        if outcome is not None:
            return exit_code, outcome
        deadline = time.monotonic() + self._grace_s
        while not self.failure and len(self._ended) < len(self._links) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        others = list(self._ended.values())
        for ended in others:
            if ended.outcome and ended.outcome.explains:
                return ended.exit_code, ended.outcome
        # A negative exit code is a signal, and a rank that was killed explains the errors of the others.
        return min([exit_code, *(ended.exit_code for ended in others)]), None

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:
        self._broadcast(AttemptEnded(exit_code=code, message=message, hint=hint))
        for link in self._links.values():
            link.close()
        return code

    def _broadcast(self, message: Message) -> None:
        for link in self._links.values():
            link.send(message)


def _restoring(manifest: Manifest | None, *, sure: bool = False) -> Restoring:
    if manifest is None:
        return Restoring(sure=sure)
    return Restoring(step=manifest.step, attempt=manifest.attempt, sure=sure)


def _combined(own: Shape, other: Shape, nodes: int) -> Shape:
    """Return the shape that every node has at least."""
    memory = [shape.memory_gib for shape in (own, other) if shape.memory_gib is not None]
    return own.model_copy(
        update={
            "nodes": nodes,
            "memory_gib": min(memory, default=None),
            "cores": min(own.cores, other.cores),
            "host_memory_gib": min(own.host_memory_gib, other.host_memory_gib),
        }
    )

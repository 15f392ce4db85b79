"""The connection between the supervisors of two nodes: messages as lines of JSON, and a heartbeat.

Like torch's own rendezvous, it trusts the network that the nodes share. No secret is sent over it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections import deque
from typing import Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome

log = logging.getLogger(__name__)
MAX_LINE_BYTES = 2**20
"""A longer line cannot be one of our messages."""


class Message(BaseModel):
    """One line of JSON. The field `kind` selects the class."""

    model_config = ConfigDict(frozen=True)

    kind: str


class Pulse(Message):
    """Either node to the other: a heartbeat, which shows that the node is still running."""

    kind: Literal["pulse"] = "pulse"


class Hello(Message):
    """A node to node 0: the first message, which introduces the node."""

    kind: Literal["hello"] = "hello"
    run: str
    """Digest of the run's address and recipe. It keeps the nodes of two runs apart."""
    node: int
    shape: Shape


class Terms(Message):
    """Node 0 to all nodes: the attempt is claimed, and this is how it is trained."""

    kind: Literal["terms"] = "terms"
    attempt: int
    token: str
    exclusive: bool
    fit: Fit
    shape: Shape
    """The combined shape of all nodes."""
    port: int
    """The port of the ranks' rendezvous, at node 0's address."""
    predicted: int | None
    """The predicted size of a checkpoint, in bytes."""


class Restoring(Message):
    """Node 0 to all nodes: the checkpoint that node 0 is restoring."""

    kind: Literal["restoring"] = "restoring"
    step: int | None = None
    """None: there is no checkpoint, and training starts at step 0."""
    attempt: int = 0
    """The attempt that committed the checkpoint."""
    sure: bool = False
    """Whether the checkpoint has been verified on node 0, so that the choice is final."""


class Ready(Message):
    """A node to node 0: it has everything that its workers need. Node 0 to all nodes: all of them have."""

    kind: Literal["ready"] = "ready"


class Noticed(Message):
    """A node to node 0: it received a preemption notice."""

    kind: Literal["noticed"] = "noticed"
    source: str


class WorkersEnded(Message):
    """A node to node 0: its workers have ended, and everything that they staged is uploaded."""

    kind: Literal["ended"] = "ended"
    exit_code: int
    outcome: Outcome | None


class AttemptEnded(Message):
    """Node 0 to all nodes: the attempt is over. A node to node 0: it cannot take part."""

    kind: Literal["end"] = "end"
    exit_code: int
    message: str = ""
    hint: str | None = None


KINDS: dict[str, type[Message]] = {
    str(kind.model_fields["kind"].default): kind
    for kind in (Pulse, Hello, Terms, Restoring, Ready, Noticed, WorkersEnded, AttemptEnded)
}
M = TypeVar("M", bound=Message)


class HeartbeatTiming(NamedTuple):
    """How often a node sends a heartbeat, and when a silent node counts as lost."""

    every_s: float = 5.0
    timeout_s: float = 60.0


DEFAULT_TIMING = HeartbeatTiming()


class Link:
    """One end of a connection.

    A thread of its own receives messages and sends heartbeats, so that a busy supervisor does not look dead.
    """

    def __init__(
        self, connection: socket.socket, peer: str, timing: HeartbeatTiming = DEFAULT_TIMING
    ) -> None:
        """Start to receive.

        Args:
            connection: the connected socket. The link owns it.
            peer: name of the other end, for messages: "node 1".
            timing: when to send heartbeats and when to stop waiting for them.
        """
        self.peer = peer
        self._connection = connection
        self._timing = timing
        self._sending = threading.Lock()
        self._changed = threading.Condition()  # guards the two attributes that follow
        self._inbox: deque[Message] = deque()
        self._lost: str | None = None
        self._closed = False
        connection.settimeout(min(1.0, timing.every_s))
        self._thread = threading.Thread(target=self._listen, name=f"link to {peer}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str | None:
        """Why the other end counts as lost. None while it is connected."""
        return self._lost

    def send(self, message: Message) -> None:
        """Send a message. If that fails, the other end counts as lost."""
        data = message.model_dump_json().encode() + b"\n"
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError as error:
            self._lose(f"{self.peer} does not answer: {error}")

    def take(self, kind: type[M]) -> M | None:
        """Remove and return the oldest received message of a kind. None if there is none."""
        with self._changed:
            for message in self._inbox:
                if isinstance(message, kind):
                    self._inbox.remove(message)
                    return message
        return None

    def close(self) -> None:
        """Close the connection. Messages that were sent before are still delivered."""
        self._closed = True
        with contextlib.suppress(OSError):  # the other end closed first
            self._connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with self._connection:
            self._receive()

    def _receive(self) -> None:
        """Receive messages and send heartbeats until the link is closed or the other end is lost."""
        buffer = b""  # an incomplete line
        received_at = sent_at = time.monotonic()
        while not self._closed and self._lost is None:
            if time.monotonic() - sent_at >= self._timing.every_s:
                sent_at = time.monotonic()
                self.send(Pulse())
            try:
                data = self._connection.recv(2**16)
            except TimeoutError:
                if (silent_s := time.monotonic() - received_at) >= self._timing.timeout_s:
                    self._lose(f"{self.peer} has sent no heartbeat for {silent_s:.0f} s")
                continue
            except OSError as error:
                self._lose(f"{self.peer} is lost: {error}")
                return
            received_at = time.monotonic()
            buffer = self._read(buffer + data) if data else b""
            if not data:
                self._lose(f"{self.peer} is lost: its supervisor ended")
            elif len(buffer) > MAX_LINE_BYTES:
                self._lose(f"{self.peer} sent an invalid message: a line of over {MAX_LINE_BYTES} bytes")

    def _read(self, buffer: bytes) -> bytes:
        """Put the complete lines into the inbox as messages. Return the incomplete last line."""
        *lines, rest = buffer.split(b"\n")
        for line in lines:
            try:
                body = json.loads(line)
                message = KINDS[body["kind"]].model_validate(body)
            except (ValueError, KeyError, TypeError, ValidationError):
                self._lose(f"{self.peer} sent an invalid message: {line[:60]!r}")
                break
            if not isinstance(message, Pulse):
                with self._changed:
                    self._inbox.append(message)
        return rest

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self._lost is None and not self._closed:
                self._lost = reason
                log.debug("%s", reason)

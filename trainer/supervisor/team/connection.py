"""A connection between the supervisors of two nodes: messages as lines of JSON, and a pulse.

As torch's own rendezvous it trusts the network that the nodes share. No secret goes over it.
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


class Message(BaseModel):
    """A line of JSON; `kind` says which."""

    model_config = ConfigDict(frozen=True)

    kind: str


class Pulse(Message):
    """I am still here."""

    kind: Literal["pulse"] = "pulse"


class Hello(Message):
    """A node to node 0: what I am."""

    kind: Literal["hello"] = "hello"
    run: str
    """Digest of the run's address and recipe: nodes of two runs must not mix."""
    node: int
    shape: Shape


class Terms(Message):
    """Node 0 to all: the attempt is claimed, and this is how we train."""

    kind: Literal["terms"] = "terms"
    attempt: int
    token: str
    exclusive: bool
    fit: Fit
    shape: Shape
    """Of all nodes together."""
    port: int
    """Where the ranks meet, at node 0's address."""
    predicted: int | None
    """Bytes of a checkpoint, by the model's numbers."""


class Restoring(Message):
    """Node 0 to all: the checkpoint that it is bringing; with `sure`, the one that has verified there."""

    kind: Literal["restoring"] = "restoring"
    step: int | None = None
    """None: there is none, training starts at step 0."""
    attempt: int = 0
    """The one that committed it."""
    sure: bool = False


class Ready(Message):
    """A node to node 0: I have all that my workers need."""

    kind: Literal["ready"] = "ready"


class Noticed(Message):
    """A node to node 0: my machine is about to go."""

    kind: Literal["noticed"] = "noticed"
    source: str


class Ended(Message):
    """A node to node 0: my workers have ended, and what they staged is uploaded."""

    kind: Literal["ended"] = "ended"
    exit_code: int
    outcome: Outcome | None


class End(Message):
    """The attempt is over: node 0 to all, or a node that cannot take part to node 0."""

    kind: Literal["end"] = "end"
    exit_code: int
    message: str = ""
    hint: str | None = None


KINDS: dict[str, type[Message]] = {
    str(kind.model_fields["kind"].default): kind
    for kind in (Pulse, Hello, Terms, Restoring, Ready, Noticed, Ended, End)
}


M = TypeVar("M", bound=Message)
LONGEST = 2**20
"""Bytes of a line; what is longer is none of ours."""


class Rhythm(NamedTuple):
    """When a node that says nothing counts as gone."""

    every_s: float = 5.0
    silence_s: float = 60.0


RHYTHM = Rhythm()


class Link:
    """One end. Reading and the pulse have a thread of their own, so a busy supervisor is not a dead one."""

    def __init__(self, connection: socket.socket, peer: str, rhythm: Rhythm = RHYTHM) -> None:
        """`peer` is who is at the other end, in words."""
        self.peer = peer
        self._connection = connection
        self._rhythm = rhythm
        self._sending = threading.Lock()
        self._changed = threading.Condition()  # guards the two that follow
        self._inbox: deque[Message] = deque()
        self._gone: str | None = None
        self._closed = False
        connection.settimeout(min(1.0, rhythm.every_s))
        self._thread = threading.Thread(target=self._listen, name=f"link to {peer}", daemon=True)
        self._thread.start()

    @property
    def gone(self) -> str | None:
        """Why the other end counts as gone; None while it is there."""
        return self._gone

    def say(self, message: Message) -> None:
        """Send a message; if the other end is gone, `gone` says so."""
        data = message.model_dump_json().encode() + b"\n"
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError as error:
            self._lose(f"{self.peer} does not answer: {error}")

    def take(self, kind: type[M]) -> M | None:
        """The oldest message of a kind that has come, once; None if there is none."""
        with self._changed:
            for message in self._inbox:
                if isinstance(message, kind):
                    self._inbox.remove(message)
                    return message
        return None

    def close(self) -> None:
        """Take leave: what was said before is still delivered."""
        self._closed = True
        with contextlib.suppress(OSError):  # the other end was quicker
            self._connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with self._connection:
            self._follow()

    def _follow(self) -> None:
        buffer = b""
        heard = said = time.monotonic()
        while not self._closed and self._gone is None:
            if time.monotonic() - said >= self._rhythm.every_s:
                said = time.monotonic()
                self.say(Pulse())
            try:
                data = self._connection.recv(2**16)
            except TimeoutError:
                if (silent_s := time.monotonic() - heard) >= self._rhythm.silence_s:
                    self._lose(f"{self.peer} has said nothing for {silent_s:.0f} s")
                continue
            except OSError as error:
                self._lose(f"{self.peer} is gone: {error}")
                return
            heard = time.monotonic()
            buffer = self._read(buffer + data) if data else b""
            if not data:
                self._lose(f"{self.peer} is gone: its supervisor ended")
            elif len(buffer) > LONGEST:
                self._lose(f"{self.peer} speaks another language")

    def _read(self, buffer: bytes) -> bytes:
        """Take the whole lines; what is left is a line in the making."""
        *lines, rest = buffer.split(b"\n")
        for line in lines:
            try:
                body = json.loads(line)
                message = KINDS[body["kind"]].model_validate(body)
            except (ValueError, KeyError, TypeError, ValidationError):
                self._lose(f"{self.peer} speaks another language: {line[:60]!r}")
                break
            if not isinstance(message, Pulse):
                with self._changed:
                    self._inbox.append(message)
        return rest

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self._gone is None and not self._closed:
                self._gone = reason
                log.debug("%s", reason)

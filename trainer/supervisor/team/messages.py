"""What nodes tell each other."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome


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

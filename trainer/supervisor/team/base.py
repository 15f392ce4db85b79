"""The protocol that every team follows, the team of a single node, and the position of this node.

The position comes from torchrun's environment variables, which the task's command sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from trainer.bucket import Bucket
from trainer.bucket.attempts import Attempt
from trainer.bucket.byte_streams import ignore_progress
from trainer.bucket.commit import Node
from trainer.bucket.restore import Progress, Restored, restore
from trainer.errors import ExitCode, UserError
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.supervisor.team.connection import Terms
from trainer.supervisor.workers import Rendezvous

NODES, RANK, ADDRESS, PORT = "GROUP_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"
"""The names are torchrun's: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables"""
SKYPILOT_NODES = "SKYPILOT_NUM_NODES"
HINT = (
    f'export {NODES}=$SKYPILOT_NUM_NODES {RANK}=$SKYPILOT_NODE_RANK {ADDRESS}=$(head -n1 <<< "$SKYPILOT_NODE_IPS")'
    f" {PORT}=29400, as jobs/*.yaml do"
)

Reject = Callable[[int, str], None]
"""A callback for a checkpoint that failed verification: its step and the reason."""


class Team(Protocol):
    """The nodes of an attempt, as one of them sees it.

    `SingleNode` implements it for one machine, `Leader` for node 0 of several, and `Member` for the other nodes.
    """

    node: Node
    shape: Shape
    """The combined shape of all nodes that have connected."""
    terms: Terms | None
    """What node 0 has decided. None on the node that decides."""

    @property
    def rendezvous(self) -> Rendezvous | None:
        """The address at which the ranks of several nodes connect. None if all ranks are on this machine."""
        ...

    @property
    def failure(self) -> str | None:
        """Why another node prevents this attempt from continuing. None if no node does."""
        ...

    @property
    def peer_notice(self) -> str | None:
        """The source of the preemption notice that another node received. None if no node received one."""
        ...

    def announce(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None:
        """Announce to the other nodes that the run is claimed, and how it is trained.

        Args:
            attempt: the claim.
            fit: the chosen fit.
            predicted: predicted size of a checkpoint, in bytes.
        """
        ...

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, progress: Progress = ignore_progress
    ) -> Restored | None:
        """Restore the same checkpoint on every node. Return once all nodes are ready.

        Raises:
            Unavailable: another node is lost.
            CorruptCheckpoint, BucketError, Unavailable: as `trainer.bucket.restore`.
        """
        ...

    def send_notice(self, source: str) -> None:
        """Report that this machine is about to be preempted."""
        ...

    def combine_outcomes(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        """Report how this node's workers ended. Return the exit code and outcome that explain the end on all nodes."""
        ...

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:
        """End the attempt on this node and return its exit code. No message can be sent afterwards."""
        ...


class SingleNode:
    """The team of one machine. It has no other node to agree with."""

    node = Node()
    terms: Terms | None = None
    rendezvous: Rendezvous | None = None
    failure: str | None = None
    peer_notice: str | None = None

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def announce(self, attempt: Attempt, fit: Fit, predicted: int | None) -> None: ...

    def restore(
        self, bucket: Bucket, into: Path, reject: Reject, progress: Progress = ignore_progress
    ) -> Restored | None:
        return restore(bucket, into, reject, progress=progress)

    def send_notice(self, source: str) -> None: ...

    def combine_outcomes(self, exit_code: int, outcome: Outcome | None) -> tuple[int, Outcome | None]:
        return exit_code, outcome

    def end(self, code: ExitCode, message: str = "", hint: str | None = None) -> ExitCode:  # noqa: ARG002
        return code


class Position(NamedTuple):
    """The position of this node among the nodes that were started together."""

    rank: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    """The address of node 0."""
    port: int = 0
    """The port on which node 0's supervisor listens for the other supervisors."""


ALONE = Position()


def read_position(environ: Mapping[str, str]) -> Position:
    """Read this node's position from the environment.

    Raises:
        UserError: several nodes were started without torchrun's variables, or a variable has an invalid value.
    """
    nodes = _number(environ, NODES, default=1, least=1)
    started = _number(environ, SKYPILOT_NODES, default=1, least=1)
    if started > 1 and nodes != started:
        # Every node would believe that it is alone, and would take the claim from the others again and again.
        raise UserError(f"{started} nodes were started for one run, but {NODES} is {nodes}", hint=HINT)
    if nodes == 1:
        return ALONE
    rank = _number(environ, RANK, default=None, least=0)
    if rank >= nodes:
        raise UserError(f"{RANK}={rank} is not below {NODES}={nodes}", hint=HINT)
    if not environ.get(ADDRESS):
        raise UserError(f"the run has {nodes} nodes, but {ADDRESS} (node 0's address) is not set", hint=HINT)
    return Position(rank, nodes, environ[ADDRESS], _number(environ, PORT, default=None, least=1))


def _number(environ: Mapping[str, str], name: str, *, default: int | None, least: int) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}; it must be a whole number of at least {least}", hint=HINT)
    return int(text)

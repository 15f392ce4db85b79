"""Which of the machines that train together this one is: torchrun's variables, which the task's command sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trainer.errors import UserError

NODES, RANK, ADDRESS, PORT = "GROUP_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"
"""As https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables names them."""
SKYPILOT_NODES = "SKYPILOT_NUM_NODES"
HINT = (
    f'export {NODES}=$SKYPILOT_NUM_NODES {RANK}=$SKYPILOT_NODE_RANK {ADDRESS}=$(head -n1 <<< "$SKYPILOT_NODE_IPS")'
    f" {PORT}=29400, as jobs/*.yaml do"
)


class Position(NamedTuple):
    """This node's place among those that were started together."""

    rank: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    """Of node 0."""
    port: int = 0
    """Where node 0's supervisor listens for the others'."""


ALONE = Position()


def position(environ: Mapping[str, str]) -> Position:
    """This node's position.

    Raises:
        UserError: several nodes were started and do not know of each other, or a variable is no number that it may be.
    """
    nodes = _number(environ, NODES, default=1, least=1)
    started = _number(environ, SKYPILOT_NODES, default=1, least=1)
    if started > 1 and nodes != started:  # each would claim the run from the others
        raise UserError(f"{started} nodes were started for one run, and {NODES} says {nodes}", hint=HINT)
    if nodes == 1:
        return ALONE
    rank = _number(environ, RANK, default=None, least=0)
    if rank >= nodes:
        raise UserError(f"{RANK}={rank}, but {NODES}={nodes}", hint=HINT)
    if not environ.get(ADDRESS):
        raise UserError(f"{nodes} nodes, and no {ADDRESS} says where node 0 is", hint=HINT)
    return Position(rank, nodes, environ[ADDRESS], _number(environ, PORT, default=None, least=1))


def _number(environ: Mapping[str, str], name: str, *, default: int | None, least: int) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}, which is no number from {least} on", hint=HINT)
    return int(text)

"""The nodes that train one run together: they connect, agree on the attempt, and end together.

Node 0 leads. It alone claims the run, decides the fit, chooses the checkpoint, commits, and determines the exit code.
The other nodes follow its messages over a TCP connection. The same connection shows each side when the other is lost.
The ranks' own network (torch.distributed) is set up only after every node has everything that its workers need.
"""

from collections.abc import Callable

from trainer.errors import UserError
from trainer.hardware import Shape
from trainer.supervisor.team.base import ALONE, Position, SingleNode, Team, read_position
from trainer.supervisor.team.leader import Leader
from trainer.supervisor.team.member import Member

__all__ = ["ALONE", "Position", "Team", "connect", "read_position"]


def connect(position: Position, run: str, shape: Shape, give_up: Callable[[], bool]) -> Team:
    """Connect to all other nodes and return the team.

    Args:
        position: this node's position.
        run: digest of everything that all nodes must agree on.
        shape: the shape of this machine.
        give_up: polled while waiting; True ends the wait.

    Raises:
        UserError: the team could not be formed. The exit code shows whether a recovery can help.
    """
    if position.nodes == 1:
        return SingleNode(shape)
    team = Member(position, shape) if position.rank else Leader(position, shape)
    try:
        team.connect(run, give_up)
    except UserError as error:
        team.end(error.exit_code, error.message, error.hint)
        raise
    return team

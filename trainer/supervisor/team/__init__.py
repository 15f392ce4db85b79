"""Several machines that train one run: they find each other, agree on what to do, and end together.

Node 0 leads: it alone claims the run, decides the fit, picks the checkpoint, commits, and says how it ended.
The others do as they are told over a connection to it, which is also how each side learns that another is gone.
The ranks' own network (torch.distributed) is set up only when all nodes have what they need.
"""

from collections.abc import Callable

from trainer.errors import UserError
from trainer.hardware import Shape
from trainer.supervisor.team.base import Alone, Team
from trainer.supervisor.team.leader import Leader
from trainer.supervisor.team.member import Member
from trainer.supervisor.team.position import ALONE, Position, position

__all__ = ["ALONE", "Position", "Team", "meet", "position"]


def meet(where: Position, run: str, shape: Shape, given_up: Callable[[], bool]) -> Team:
    """The team, complete.

    Args:
        where: this node's position.
        run: digest of what all nodes must agree on.
        shape: this machine.
        given_up: whether to wait no longer.

    Raises:
        UserError: it cannot be had, with the exit code that says whether a recovery can help.
    """
    if where.nodes == 1:
        return Alone(shape)
    team = Member(where, shape) if where.rank else Leader(where, shape)
    try:
        team.meet(run, given_up)
    except UserError as error:
        team.end(error.exit_code, error.message, error.hint)
        raise
    return team

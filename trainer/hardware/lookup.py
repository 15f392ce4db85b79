"""GPUs by the name that SkyPilot rents them under, and the boards that shapes have."""

from __future__ import annotations

import difflib
from functools import cache

from trainer.errors import UserError
from trainer.hardware.board import Gpu
from trainer.hardware.shape import Shape
from trainer.hardware.table import ALIASES, GPUS

USABLE_OF_UNKNOWN = 0.95
"""Share of its memory that a GPU outside the table gives to processes; derived: below the least in it, the T4's 0.97."""


def known_gpu(name: str) -> Gpu | None:
    """A GPU of the table, under any of its names, in any case; None if the table has none."""
    names, aliases = _by_name()
    folded = name.casefold()
    return names.get(folded) or names.get(aliases.get(folded, "").casefold())


def gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: the table has none of that name; names the nearest.
    """
    found = known_gpu(name)
    if found is None:
        raise _unknown(name)
    return found


def gpu_of(shape: Shape) -> Gpu | None:
    """The board that a shape has; None without a GPU, or with one that the table does not know."""
    name = shape.board or shape.accelerator
    return known_gpu(name) if name else None


def usable_gib(shape: Shape) -> float | None:
    """What CUDA has for processes on one GPU of a shape, GiB; None without a GPU.

    Of a GPU outside the table it is a share of its memory; of a part of one (MIG, vGPU), that of the part.
    """
    if shape.memory_gib is None:
        return None
    board = gpu_of(shape)
    if board is None:
        return shape.memory_gib * USABLE_OF_UNKNOWN
    return shape.memory_gib * board.usable_gib / board.memory_gib


@cache
def _by_name() -> tuple[dict[str, Gpu], dict[str, str]]:
    """Boards by name and names by alias; both in one case."""
    names = {board.name.casefold(): board for board in GPUS}
    return names, {alias.casefold(): name for alias, name in ALIASES.items()}


def _unknown(name: str) -> UserError:
    names, aliases = _by_name()
    known = {**{folded: board.name for folded, board in names.items()}, **{a: a.upper() for a in aliases}}
    near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)
    listed = ", ".join(f"`{known[folded]}`" for folded in near)
    everyone = ", ".join(board.name for board in names.values())
    return UserError(
        f"no GPU `{name}` in the table", hint=f"did you mean {listed}?" if near else f"known: {everyone}"
    )

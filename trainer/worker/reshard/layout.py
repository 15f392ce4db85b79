"""In which form an engine keeps its state, and when it has to be brought into another."""

from __future__ import annotations

from typing import NamedTuple

from trainer.worker.resume import Identity


class Form(NamedTuple):
    """Checkpoints of one form are loaded by the engine itself, bit for bit."""

    engine: str
    """`zero2`, `zero3`, `fsdp2`, or `whole` replicas, of which it does not matter how many there are."""
    ranks: int
    offload: tuple[bool, bool]
    """Of optimizer and parameters: other code steps the same numbers there, and counts its steps otherwise."""

    @classmethod
    def of(cls, one: Identity) -> Form:
        if one.engine in ("single", "ddp"):
            return cls("whole", 1, (False, False))
        return cls(one.engine, one.world_size, (one.offload_optimizer, one.offload_parameters))


def converts(theirs: Identity, mine: Identity) -> bool:
    return Form.of(theirs) != Form.of(mine)

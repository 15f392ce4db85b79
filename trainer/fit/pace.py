"""Of the layouts that fit, which is the fastest: the estimate's seconds of a step decide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trainer.estimate import step_s, usual_workload
from trainer.fit.ways import Tried, Way, micro_batches
from trainer.hardware import Shape
from trainer.memory import Architecture, Layout
from trainer.recipe import Recipe

WORTH = 1.01
"""Own assumption: the factor by which a step has to become faster for each doubling of the micro batch. An estimate that is
off by up to 15 % of what was published does not tell a part in a hundred; less memory is then the better choice."""
ENGINE_WORTH = {"single": 1.0, "ddp": 1.0, "zero2": 1.02, "zero3": 1.07, "fsdp2": 1.07}
"""Own assumption: the same for an engine that keeps parts of the state elsewhere, for its hooks in Python and its small
messages, which the estimate does not count: where parameters are cut they cost a small model on a CPU more than all the
rest (`bench/engines.md`). No published run checks ZeRO 2."""


class Timed(NamedTuple):
    """A layout and the seconds that a step of it is predicted to take."""

    layout: Layout
    seconds: float


def timed(
    fitting: Sequence[Tried], recipe: Recipe, shape: Shape, architecture: Architecture
) -> tuple[Timed, ...]:
    """What could be chosen, the best first. It is a function of recipe, shape and model alone, whether or not the data
    were read, so that laptop and node choose the same.

    The micro batch that a recipe names is taken as near as memory lets come to it, not below.
    """
    workload = usual_workload(recipe)
    found = [
        Timed(layout, step_s(recipe, architecture, layout, shape, workload))
        for layout in _within(fitting, recipe, recipe.global_batch_size // shape.gpus)
    ]
    return tuple(sorted(found, key=rank))


def rank(each: Timed) -> tuple[int, float, int]:
    """Least first: no offload before any, then seconds, in which near ties go to less memory and the simpler engine.

    It orders any layouts of a recipe on a shape, whatever its memory: with more of it a fit never gets worse.
    """
    layout = each.layout
    offloaded = layout.offload_optimizer + layout.offload_parameters
    worth = WORTH ** math.log2(layout.micro_batch) * ENGINE_WORTH[layout.engine]
    return offloaded, each.seconds * worth, layout.micro_batch


def _within(fitting: Sequence[Tried], recipe: Recipe, share: int) -> Iterator[Layout]:
    """All that the largest micro batches which fit make room for. With checkpointing only those that do not fit without:
    the others would be computed twice for nothing.
    """
    largest: dict[tuple[Way, bool], Layout] = {}
    for each in fitting:
        key = each.way, each.layout.activation_checkpointing
        if key not in largest or each.layout.micro_batch > largest[key].micro_batch:
            largest[key] = each.layout
    for (way, checkpointing), layout in largest.items():
        plain = largest.get((way, False))
        above = plain.micro_batch if checkpointing and plain else 0
        for size in micro_batches(recipe, share):
            if size == layout.micro_batch or (
                above < size < layout.micro_batch and not recipe.micro_batch_size
            ):
                yield layout.model_copy(update={"micro_batch": size})

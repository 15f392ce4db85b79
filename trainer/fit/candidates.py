"""The layouts that a recipe could have on a shape, and what memory each takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from trainer.architecture import Architecture
from trainer.errors import NoFit
from trainer.estimate import step_s, usual_workload
from trainer.fit.recipe_choices import attention_of, checkpointing_of, engine_of, reference_of
from trainer.hardware import Gpu, Shape, gpu_of, has_bf16
from trainer.memory import Attention, Engine, Layout, Usage, predict_usage
from trainer.memory.precision import half_precision, loaded_dtype
from trainer.memory.resident import DEFAULT_OPTIMIZER, optimizer_of
from trainer.recipe import Recipe

LARGEST_MICRO_BATCH = 8
"""On the CPU, where memory is not what limits it."""
LARGEST_GPU_MICRO_BATCH = 32
"""Own assumption: beyond it a GPU gets no faster."""
CUTS_PARAMETERS: Engine = "zero3"
"""Of ZeRO 3 and FSDP 2, which do the same, the one that is taken where the recipe is silent. Neither was measured to be the
faster (`bench/engines.md`); FSDP 2 is predicted to take less on the way, of 7B on eight GPUs some 1.5 GiB, which nothing
has shown on a GPU yet (`bench/memory.md`)."""
Way = tuple[Engine, bool, bool]
"""An engine, and whether optimizer and parameters are offloaded."""


def way_of(layout: Layout) -> Way:
    return layout.engine, layout.offload_optimizer, layout.offload_parameters


class Tried(NamedTuple):
    """A layout with what it takes."""

    layout: Layout
    gpu: Usage
    host: Usage

    @property
    def way(self) -> Way:
        return way_of(self.layout)


class MemoryBudget(NamedTuple):
    """What a shape has for a run, GiB."""

    gpu: float
    host: float

    def holds(self, tried: Tried) -> bool:
        return tried.gpu.gib <= self.gpu and tried.host.gib <= self.host


def tries(
    recipe: Recipe, shape: Shape, architecture: Architecture, share: int, room: MemoryBudget
) -> Iterator[Tried]:
    """Layouts that the recipe allows, as far as it takes to find the largest micro batch of each way that fits, with
    activation checkpointing only those beyond the largest without; `share` is a GPU's part of the batch.

    Where a way fits, none with more offload is tried. The estimate has it that some would be faster where traffic is slow,
    most of them between nodes; but there a guess stands against another, the network of a node that nobody told against the
    host's rate, of which one table of 2021 is all that is known (`bench/estimate.md`). Nor does it count that DeepSpeed
    brings back what is summed on the host for each micro batch (stage_1_and_2.py, `async_accumulate_grad_in_cpu_via_gpu`).

    Where nothing fits, the smallest layout of each way comes.

    Raises:
        NoFit: what the recipe asks for is not possible.
        RecipeError: the recipe does not limit the length of its sequences.
    """
    found: int | None = None
    for way in _ways(recipe, shape):
        if found is not None and way[1] + way[2] > found:
            return
        sizes = micro_batches(recipe, share)
        for checkpointing in _checkpointings(recipe):
            attempt = partial(_try, recipe, shape, architecture, way, checkpointing)
            for tried in _up_to_the_largest(sizes, attempt, room):
                yield tried
                if room.holds(tried):
                    found = way[1] + way[2]
                    sizes = [size for size in sizes if size > tried.layout.micro_batch]


def _up_to_the_largest(
    sizes: list[int], attempt: Callable[[int], Tried], room: MemoryBudget
) -> Iterator[Tried]:
    """The smallest micro batch, and if it fits those that lead, by halves, to the largest that does."""
    if not sizes:
        return
    smallest = attempt(sizes[0])
    yield smallest
    low, high = 0, len(sizes) - 1 if room.holds(smallest) else 0
    while low < high:
        middle = (low + high + 1) // 2
        tried = attempt(sizes[middle])
        yield tried
        low, high = (middle, high) if room.holds(tried) else (low, middle - 1)


def _try(
    recipe: Recipe, shape: Shape, architecture: Architecture, way: Way, checkpointing: bool, micro: int
) -> Tried:
    layout = Layout(
        processes=shape.gpus,
        nodes=shape.nodes,
        micro_batch=micro,
        engine=way[0],
        offload_optimizer=way[1],
        offload_parameters=way[2],
        attention=attention_on(recipe, architecture, gpu_of(shape)),
        activation_checkpointing=checkpointing,
        reference=reference_of(recipe),
    )
    return taking(recipe, shape, architecture, layout)


def taking(recipe: Recipe, shape: Shape, architecture: Architecture, layout: Layout) -> Tried:
    """A layout with what it takes on a shape."""
    return Tried(layout, *predict_usage(recipe, architecture, layout, has_bf16=has_bf16(gpu_of(shape))))


def attention_on(recipe: Recipe, architecture: Architecture, board: Gpu | None) -> Attention:
    """The recipe's choice, or the fastest that the board has; FlashAttention, which knows no float32, gives way where
    it cannot run.
    """
    wanted = attention_of(recipe) or "flash_attention_2"
    in_half = (
        half_precision(recipe, has_bf16=has_bf16(board)) or loaded_dtype(recipe, architecture) != "float32"
    )
    has_flash = board is not None and board.has_flash_attention and in_half
    return "sdpa" if wanted == "flash_attention_2" and not has_flash else wanted


def largest_divisor(whole: int, *, at_most: int) -> int:
    return max(size for size in range(1, min(whole, at_most) + 1) if whole % size == 0)


def _ways(recipe: Recipe, shape: Shape) -> list[Way]:
    """What the recipe's `offload` names, or all."""
    several = shape.gpus > 1
    ways = _possible(recipe, several=several) if recipe.engine is None else _named(recipe, several=several)
    if recipe.offload is None:
        return ways
    wanted = {"none": (False, False), "optimizer": (True, False), "all": (True, True)}[recipe.offload]
    asked = [way for way in ways if way[1:] == wanted]
    if not asked:
        raise NoFit(
            f"recipe {recipe.name}: nothing of it can be offloaded as `offload: {recipe.offload}` asks",
            hint="DeepSpeed steps AdamW, RMSprop and their like on the host, of models that are not quantised",
        )
    return asked


def _possible(recipe: Recipe, *, several: bool) -> list[Way]:
    """Whole replicas; then ZeRO, which cannot cut what bitsandbytes packed, and whose second stage saves nothing of
    LoRA's small state; then with offload, by an optimizer that can step on the host.
    """
    ways: list[Way] = [("ddp" if several else "single", False, False)]
    if recipe.is_quantised:
        return ways
    second: list[Way] = [] if recipe.is_lora else [("zero2", False, False)]
    if several:
        ways += [*second, (CUTS_PARAMETERS, False, False)]
    if optimizer_of(str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER))).offloads:
        ways += [(engine, True, False) for engine, _, _ in second]
        ways += [("zero3", True, False), ("zero3", True, True)]
    return ways


def _named(recipe: Recipe, *, several: bool) -> list[Way]:
    """The engine that the recipe names; of DeepSpeed's, with offload after without."""
    engine = engine_of(recipe, several=several)
    steps = optimizer_of(str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER))).offloads
    if engine == "fsdp2" and not steps:
        raise NoFit(
            f"recipe {recipe.name}: `optim: {recipe.trainer_args['optim']}` steps no weights that FSDP 2 has cut",
            hint=f"take `optim: {DEFAULT_OPTIMIZER}`, or leave out `engine: fsdp2`",
        )
    ways: list[Way] = [(engine, False, False)]
    if engine in ("zero2", "zero3") and steps:
        ways.append((engine, True, False))
    return [*ways, ("zero3", True, True)] if engine == "zero3" and steps else ways


def _checkpointings(recipe: Recipe) -> tuple[bool, ...]:
    wanted = checkpointing_of(recipe)
    return (False, True) if wanted is None else (wanted,)


def micro_batches(recipe: Recipe, share: int) -> list[int]:
    """Divisors of a process's share, up to the recipe's wish, smallest first."""
    most = min(share, recipe.micro_batch_size or LARGEST_GPU_MICRO_BATCH)
    return [size for size in range(1, most + 1) if share % size == 0]


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

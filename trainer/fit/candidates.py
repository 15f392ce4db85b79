"""The layouts that a recipe could have on a shape, with the memory of each and the predicted seconds of its step."""

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
"""The largest micro batch on the CPU, where memory does not limit it."""
LARGEST_GPU_MICRO_BATCH = 32
"""Own assumption: a larger micro batch does not make a GPU faster."""
DEFAULT_SHARDED: Engine = "zero3"
"""The engine that shards parameters if the recipe names none. ZeRO-3 and FSDP2 do the same, and neither was measured to be
faster (`bench/engines.md`). FSDP2 is predicted to need less transient memory, some 1.5 GiB for 7B on eight GPUs, but no
GPU has confirmed that yet (`bench/memory.md`)."""
WORTH = 1.01
"""Own assumption: the factor by which a step has to become faster for each doubling of the micro batch. An estimate that
differs by up to 15 % from published runs cannot tell a difference of 1 %, and then less memory is the better choice."""
ENGINE_WORTH = {"single": 1.0, "ddp": 1.0, "zero2": 1.02, "zero3": 1.07, "fsdp2": 1.07}
"""Own assumption: the same factor for an engine that shards state. It stands for Python hooks and small messages, which the
estimate does not count. With sharded parameters they cost a small model on a CPU more than everything else
(`bench/engines.md`). No published run checks ZeRO-2."""
Strategy = tuple[Engine, bool, bool]
"""An engine, whether the optimizer is offloaded, and whether the parameters are."""


class SizedLayout(NamedTuple):
    """A layout with the memory that it takes."""

    layout: Layout
    gpu: Usage
    host: Usage

    @property
    def strategy(self) -> Strategy:
        return strategy_of(self.layout)


class TimedLayout(NamedTuple):
    """A layout with the predicted seconds of its step."""

    layout: Layout
    seconds: float


class MemoryBudget(NamedTuple):
    """The memory that a shape has for a run, in GiB of each GPU and of each host."""

    gpu: float
    host: float

    def holds(self, sized: SizedLayout) -> bool:
        """Whether the layout fits into this memory."""
        return sized.gpu.gib <= self.gpu and sized.host.gib <= self.host


def strategy_of(layout: Layout) -> Strategy:
    """Return the strategy of a layout."""
    return layout.engine, layout.offload_optimizer, layout.offload_parameters


def size_layouts(
    recipe: Recipe, shape: Shape, architecture: Architecture, share: int, budget: MemoryBudget
) -> Iterator[SizedLayout]:
    """Yield layouts that the recipe allows, until the largest micro batch of each strategy that fits is found.

    With activation checkpointing, only micro batches beyond the largest one without it are tried. If nothing fits,
    the smallest layout of each strategy is among the results.

    If a strategy fits, none with more offload is tried. The estimate predicts that some of them would be faster where
    traffic is slow, mostly between nodes. But that compares two guesses: the network of a node that is not known, and
    the host's rate, for which one table of 2021 is the only source (`bench/estimate.md`). The estimate also does not
    count that DeepSpeed copies the sum on the host back for each micro batch (stage_1_and_2.py,
    `async_accumulate_grad_in_cpu_via_gpu`).

    Args:
        recipe: the recipe.
        shape: the machines.
        architecture: the architecture of its model.
        share: rows of the global batch per GPU.
        budget: the memory of the shape.

    Raises:
        NoFit: the recipe asks for something impossible.
        RecipeError: the recipe does not limit the length of its sequences.
    """
    fitting_offload: int | None = None
    for strategy in _list_strategies(recipe, shape):
        offload = strategy[1] + strategy[2]
        if fitting_offload is not None and offload > fitting_offload:
            return
        sizes = list_micro_batches(recipe, share)
        for checkpointing in _list_checkpointing(recipe):
            size_one = partial(_size_candidate, recipe, shape, architecture, strategy, checkpointing)
            for sized in _search_largest(sizes, size_one, budget):
                yield sized
                if budget.holds(sized):
                    fitting_offload = offload
                    sizes = [size for size in sizes if size > sized.layout.micro_batch]


def size_layout(recipe: Recipe, shape: Shape, architecture: Architecture, layout: Layout) -> SizedLayout:
    """Return a layout with the memory that it takes on a shape."""
    return SizedLayout(layout, *predict_usage(recipe, architecture, layout, has_bf16=has_bf16(gpu_of(shape))))


def choose_attention(recipe: Recipe, architecture: Architecture, board: Gpu | None) -> Attention:
    """Return the recipe's attention, or else the fastest that the GPU has.

    FlashAttention 2 has no float32 and needs a newer GPU. Where it cannot run, `sdpa` replaces it.
    """
    wanted = attention_of(recipe) or "flash_attention_2"
    in_half = (
        half_precision(recipe, has_bf16=has_bf16(board)) or loaded_dtype(recipe, architecture) != "float32"
    )
    has_flash = board is not None and board.has_flash_attention and in_half
    return "sdpa" if wanted == "flash_attention_2" and not has_flash else wanted


def find_largest_divisor(whole: int, *, at_most: int) -> int:
    """Return the largest divisor of `whole` that is not above `at_most`."""
    return max(size for size in range(1, min(whole, at_most) + 1) if whole % size == 0)


def list_micro_batches(recipe: Recipe, share: int) -> list[int]:
    """Return the divisors of a process's share up to the recipe's `micro_batch_size`, the smallest first."""
    most = min(share, recipe.micro_batch_size or LARGEST_GPU_MICRO_BATCH)
    return [size for size in range(1, most + 1) if share % size == 0]


def time_layouts(
    fitting: Sequence[SizedLayout], recipe: Recipe, shape: Shape, architecture: Architecture
) -> tuple[TimedLayout, ...]:
    """Return the layouts to choose from with their predicted seconds, the best first.

    The result depends only on recipe, shape and model, not on data that were read, so that laptop and node choose the
    same. If the recipe sets `micro_batch_size`, only the largest micro batches that fit are candidates.
    """
    workload = usual_workload(recipe)
    found = [
        TimedLayout(layout, step_s(recipe, architecture, layout, shape, workload))
        for layout in _expand_micro_batches(fitting, recipe, recipe.global_batch_size // shape.gpus)
    ]
    return tuple(sorted(found, key=rank))


def rank(timed: TimedLayout) -> tuple[int, float, int]:
    """Return the sort key of a layout: less offload first, then fewer seconds, then the smaller micro batch.

    `WORTH` and `ENGINE_WORTH` increase the seconds. If two layouts are almost equally fast, the one that needs less memory
    or has the simpler engine is therefore chosen. The key does not depend on how much memory the machine has, so a machine
    with more memory never gets a worse layout.
    """
    layout = timed.layout
    offloaded = layout.offload_optimizer + layout.offload_parameters
    worth = WORTH ** math.log2(layout.micro_batch) * ENGINE_WORTH[layout.engine]
    return offloaded, timed.seconds * worth, layout.micro_batch


def _search_largest(
    sizes: list[int], size_one: Callable[[int], SizedLayout], budget: MemoryBudget
) -> Iterator[SizedLayout]:
    """Yield the smallest micro batch, and if it fits, the steps of a binary search for the largest that fits."""
    if not sizes:
        return
    smallest = size_one(sizes[0])
    yield smallest
    low, high = 0, len(sizes) - 1 if budget.holds(smallest) else 0
    while low < high:
        middle = (low + high + 1) // 2
        sized = size_one(sizes[middle])
        yield sized
        low, high = (middle, high) if budget.holds(sized) else (low, middle - 1)


def _size_candidate(
    recipe: Recipe,
    shape: Shape,
    architecture: Architecture,
    strategy: Strategy,
    checkpointing: bool,
    micro: int,
) -> SizedLayout:
    layout = Layout(
        processes=shape.gpus,
        nodes=shape.nodes,
        micro_batch=micro,
        engine=strategy[0],
        offload_optimizer=strategy[1],
        offload_parameters=strategy[2],
        attention=choose_attention(recipe, architecture, gpu_of(shape)),
        activation_checkpointing=checkpointing,
        reference=reference_of(recipe),
    )
    return size_layout(recipe, shape, architecture, layout)


def _list_strategies(recipe: Recipe, shape: Shape) -> list[Strategy]:
    """Return the strategies that the recipe's `engine` and `offload` allow, the simplest first."""
    several = shape.gpus > 1
    strategies = (
        _possible_strategies(recipe, several=several)
        if recipe.engine is None
        else _strategies_of_engine(recipe, several=several)
    )
    if recipe.offload is None:
        return strategies
    wanted = {"none": (False, False), "optimizer": (True, False), "all": (True, True)}[recipe.offload]
    matching = [strategy for strategy in strategies if strategy[1:] == wanted]
    if not matching:
        raise NoFit(
            f"recipe {recipe.name} sets `offload: {recipe.offload}`, but its state cannot be offloaded",
            hint="leave out `offload`; DeepSpeed can offload only models that are not quantised, with an optimizer "
            "that steps on the host, such as AdamW or RMSprop",
        )
    return matching


def _possible_strategies(recipe: Recipe, *, several: bool) -> list[Strategy]:
    """Return the strategies for a recipe that names no engine.

    Whole replicas come first, then ZeRO, then ZeRO with offload if the optimizer can step on the host. ZeRO cannot
    shard what bitsandbytes quantised. ZeRO-2 is left out for LoRA, whose state is too small to save anything.
    """
    strategies: list[Strategy] = [("ddp" if several else "single", False, False)]
    if recipe.is_quantised:
        return strategies
    second: list[Strategy] = [] if recipe.is_lora else [("zero2", False, False)]
    if several:
        strategies += [*second, (DEFAULT_SHARDED, False, False)]
    if optimizer_of(str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER))).offloads:
        strategies += [(engine, True, False) for engine, _, _ in second]
        strategies += [("zero3", True, False), ("zero3", True, True)]
    return strategies


def _strategies_of_engine(recipe: Recipe, *, several: bool) -> list[Strategy]:
    """Return the strategies with the recipe's own engine: first without offload, then with it where DeepSpeed has it."""
    engine = engine_of(recipe, several=several)
    steps_on_host = optimizer_of(str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER))).offloads
    if engine == "fsdp2" and not steps_on_host:
        raise NoFit(
            f"recipe {recipe.name}: `optim: {recipe.trainer_args['optim']}` cannot step the weights that FSDP2 shards",
            hint=f"take `optim: {DEFAULT_OPTIMIZER}`, or leave out `engine: fsdp2`",
        )
    strategies: list[Strategy] = [(engine, False, False)]
    if engine in ("zero2", "zero3") and steps_on_host:
        strategies.append((engine, True, False))
    if engine == "zero3" and steps_on_host:
        strategies.append(("zero3", True, True))
    return strategies


def _list_checkpointing(recipe: Recipe) -> tuple[bool, ...]:
    """Return the values of activation checkpointing to try."""
    wanted = checkpointing_of(recipe)
    return (False, True) if wanted is None else (wanted,)


def _expand_micro_batches(fitting: Sequence[SizedLayout], recipe: Recipe, share: int) -> Iterator[Layout]:
    """Yield the layouts with every micro batch up to the largest that fits.

    With checkpointing, only micro batches that do not fit without it are useful: it would compute the others twice
    for no gain.
    """
    largest: dict[tuple[Strategy, bool], Layout] = {}
    for sized in fitting:
        key = sized.strategy, sized.layout.activation_checkpointing
        if key not in largest or sized.layout.micro_batch > largest[key].micro_batch:
            largest[key] = sized.layout
    for (strategy, checkpointing), layout in largest.items():
        plain = largest.get((strategy, False))
        above = plain.micro_batch if checkpointing and plain else 0
        for size in list_micro_batches(recipe, share):
            if size == layout.micro_batch or (
                above < size < layout.micro_batch and not recipe.micro_batch_size
            ):
                yield layout.model_copy(update={"micro_batch": size})

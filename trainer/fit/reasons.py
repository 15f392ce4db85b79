"""The texts of a fit: the reason for each of its choices, and the errors if there is no fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainer.architecture import Architecture
from trainer.errors import NoFit
from trainer.fit.candidates import (
    LARGEST_MICRO_BATCH,
    WORTH,
    MemoryBudget,
    SizedLayout,
    TimedLayout,
    size_layouts,
    strategy_of,
)
from trainer.fit.recipe_choices import attention_of, checkpointing_of
from trainer.hardware import Shape
from trainer.hardware.table import GPUS
from trainer.memory import Usage
from trainer.memory.layout import ENGINE_TITLES
from trainer.memory.precision import needs_bf16
from trainer.recipe import Recipe

MOST_GPUS = 8
"""GPUs of a node at the clouds that we rent from. Hints do not suggest more."""


class Choice(NamedTuple):
    """The chosen layout, the layouts that it was chosen from, and the memory of the shape."""

    best: SizedLayout
    sized: tuple[SizedLayout, ...]
    budget: MemoryBudget
    timed: tuple[TimedLayout, ...]
    """All layouts that could be chosen, the best first."""


def list_reasons(choice: Choice, recipe: Recipe, shape: Shape, share: int) -> tuple[str, ...]:
    """Return the reason for each choice; `share` is the rows of the global batch per process."""
    layout, budget = choice.best.layout, choice.budget
    accumulation = share // layout.micro_batch
    return (
        f"{layout.processes} process{'es, one per GPU' if layout.processes > 1 else ''}",
        _why_engine(choice, recipe),
        _why_checkpointing(choice, recipe),
        _why_micro_batch(choice, recipe, share),
        f"accumulation {accumulation}: {layout.processes} x {layout.micro_batch} x {accumulation} = {recipe.global_batch_size}",
        _why_attention(recipe, layout.attention, shape),
        f"GPU memory {choice.best.gpu.gib:.1f} of {budget.gpu:.1f} GiB: {list_largest(choice.best.gpu)}",
        f"host memory {choice.best.host.gib:.0f} of {budget.host:.0f} GiB: {list_largest(choice.best.host)}",
    )


def why_cpu_micro_batch(recipe: Recipe, *, share: int, micro: int) -> str:
    """Return the reason for the micro batch on the CPU."""
    wanted = recipe.micro_batch_size
    if wanted == micro:
        return f"micro batch {micro}: set by the recipe"
    if wanted:
        return f"micro batch {micro}: the recipe's {wanted} does not divide the {share} rows of a process"
    return f"micro batch {micro}: the largest up to {LARGEST_MICRO_BATCH} that divides the {share} rows of a process"


def list_largest(usage: Usage, count: int = 3) -> str:
    """Return the largest terms as text: `activations 31.2 GiB, optimizer 6.7 GiB`."""
    terms = sorted(usage.terms, key=lambda term: term.gib, reverse=True)[:count]
    return ", ".join(f"{term.name} {term.gib:.1f} GiB" for term in terms)


def uneven_batch(recipe: Recipe, shape: Shape) -> NoFit:
    """Return the error that the global batch cannot be shared evenly. Its hint names the nearest numbers that can."""
    batch, count = recipe.global_batch_size, shape.gpus or shape.nodes
    what = "GPUs" if shape.gpus else "machines"
    counts = [size for size in range(1, batch + 1) if batch % size == 0]
    below = [size for size in counts if size <= count][-1:]
    above = [size for size in counts if size > count][:1]
    batches = [size for size in (batch // count * count, (batch // count + 1) * count) if size]
    return NoFit(
        f"recipe {recipe.name} has global_batch_size {batch}, which {count} {what} ({shape}) cannot share evenly",
        hint=f"take {' or '.join(str(size) for size in (*below, *above))} {what}, "
        f"or change the training: {' or '.join(f'`global_batch_size={size}`' for size in batches)}",
    )


def unknown_architecture(recipe: Recipe) -> NoFit:
    """Return the error that the memory cannot be predicted, because the architecture is unknown."""
    return NoFit(
        f"recipe {recipe.name}: the architecture of the model {recipe.model_name_or_path} is unknown, so its memory "
        "cannot be predicted",
        hint="give a folder that has the model's config.json, or give this machine access to the Hub",
    )


def no_bf16(recipe: Recipe, shape: Shape) -> NoFit:
    """Return the error that the recipe needs bfloat16 and the GPU does not have it."""
    names = ", ".join(board.name for board in GPUS if board.has_bf16)
    other = (
        ""
        if recipe.is_quantised
        else "; or change the training's precision: `bf16=false fp16=true dtype=float16`"
    )
    return NoFit(
        f"recipe {recipe.name} computes in bfloat16, which {shape} does not support",
        hint=f"take one of these GPUs: {names}{other}",
    )


def too_large(
    recipe: Recipe,
    shape: Shape,
    architecture: Architecture,
    sized: Sequence[SizedLayout],
    budget: MemoryBudget,
) -> NoFit:
    """Return the error that no layout fits: what the smallest one needs, what the shape has, and what would fit."""
    hardware = [
        *_find_larger_gpu(recipe, shape, architecture, sized, budget),
        *_find_more_gpus(recipe, shape, architecture, budget),
    ]
    fits_gpu = [candidate for candidate in sized if candidate.gpu.gib <= budget.gpu]
    if fits_gpu:
        least = min(fits_gpu, key=lambda candidate: candidate.host.gib)
        need = f"{least.host.gib:.0f} GiB of each host's memory; {shape} has {budget.host:.0f} available"
        return NoFit(
            f"recipe {recipe.name} needs {need} ({list_largest(least.host)})",
            hint=", or ".join(["take nodes with more memory", *hardware, *_removable_keys(recipe)]),
        )
    least = min(sized, key=lambda candidate: candidate.gpu.gib)
    need = f"{least.gpu.gib:.1f} GiB of each GPU's memory; {shape} has {budget.gpu:.1f} available"
    changes = _removable_keys(recipe) or ([] if hardware else _smaller_training(recipe))
    return NoFit(
        f"recipe {recipe.name} needs {need} ({list_largest(least.gpu)})",
        hint=", or ".join([f"take {' or '.join(hardware)}"] * bool(hardware) + changes),
    )


def _why_engine(choice: Choice, recipe: Recipe) -> str:
    layout = choice.best.layout
    title = ENGINE_TITLES[layout.engine] + (", offloaded" if layout.offload_optimizer else "")
    if recipe.offload and layout.offload_optimizer:
        return f"{title}: set by the recipe (`offload: {recipe.offload}`)"
    others = _compare_simpler(choice)
    if recipe.engine:
        return f"{title}: set by the recipe (`engine: {recipe.engine}`)" + (f"; {others}" if others else "")
    return f"{title}: {others}" if others else f"{title}: each GPU can hold the whole training state"


def _compare_simpler(choice: Choice) -> str:
    """Return what each simpler strategy would take: the time of its fastest layout, or the memory of its smallest."""
    strategies = list(dict.fromkeys(candidate.strategy for candidate in choice.sized))
    texts = []
    for other in strategies[: strategies.index(choice.best.strategy)]:
        title = f"{ENGINE_TITLES[other[0]]}{' offloaded' if other[1] else ''}"
        fastest = min(
            (timed.seconds for timed in choice.timed if strategy_of(timed.layout) == other), default=None
        )
        if fastest is not None:
            texts.append(f"{title} takes {fastest:.3g} s per step")
            continue
        least = min(
            (candidate for candidate in choice.sized if candidate.strategy == other),
            key=lambda candidate: candidate.gpu.gib,
        )
        need = f"{least.gpu.gib:.0f} GiB of each GPU"
        if least.gpu.gib <= choice.budget.gpu:
            need = f"{least.host.gib:.0f} GiB of each host"
        texts.append(f"{title} needs {need}")
    return "; ".join(texts)


def _why_checkpointing(choice: Choice, recipe: Recipe) -> str:
    is_on = choice.best.layout.activation_checkpointing
    state = "activation checkpointing" if is_on else "no activation checkpointing"
    if checkpointing_of(recipe) is not None:
        return f"{state}: set by the recipe"
    if not is_on:
        return f"{state}: all activations fit"
    without = [timed for timed in _of_same_strategy(choice) if not timed.layout.activation_checkpointing]
    if not without:
        return f"{state}: without it no micro batch fits"
    fastest = min(without, key=lambda timed: timed.seconds)
    return f"{state}: it allows a larger micro batch; without it a step takes {_describe_step(fastest)}"


def _of_same_strategy(choice: Choice) -> list[TimedLayout]:
    return [timed for timed in choice.timed if strategy_of(timed.layout) == choice.best.strategy]


def _describe_step(timed: TimedLayout, *, checkpointing: bool = False) -> str:
    """Return seconds and micro batch as text. `checkpointing` is whether the chosen layout has it as well."""
    recomputed = " and checkpointing" if timed.layout.activation_checkpointing and not checkpointing else ""
    return f"{timed.seconds:.3g} s with {timed.layout.micro_batch}{recomputed}"


def _why_micro_batch(choice: Choice, recipe: Recipe, share: int) -> str:
    micro = choice.best.layout.micro_batch
    wanted = recipe.micro_batch_size
    if wanted == micro:
        return f"micro batch {micro}: set by the recipe"
    if wanted and micro == share:
        return f"micro batch {micro}: the whole share of a process"
    if wanted:
        return (
            f"micro batch {micro}: the largest up to the recipe's {wanted} that fits and divides the {share} rows of a "
            "process"
        )
    return f"micro batch {micro}: {_compare_micro_batches(choice)}"


def _compare_micro_batches(choice: Choice) -> str:
    """Return the seconds of a step, and those of the next smaller and the next larger micro batch."""
    best, micro = choice.timed[0], choice.best.layout.micro_batch
    others = sorted(_of_same_strategy(choice), key=lambda timed: timed.layout.micro_batch)
    neighbours = [
        *[timed for timed in others if timed.layout.micro_batch < micro][-1:],
        *[timed for timed in others if timed.layout.micro_batch > micro][:1],
    ]
    is_on = best.layout.activation_checkpointing
    steps = [_describe_step(timed, checkpointing=is_on) for timed in neighbours]
    text = ", ".join([f"{best.seconds:.3g} s per step predicted", *steps])
    if any(timed.seconds < best.seconds for timed in neighbours):
        return f"{text}; a micro batch twice as large has to be at least {WORTH - 1:.0%} faster"
    return text


def _why_attention(recipe: Recipe, attention: str, shape: Shape) -> str:
    if attention_of(recipe) == attention:
        return f"attention {attention}: set by the recipe"
    if attention == "sdpa":
        return (
            "attention sdpa: FlashAttention 2 needs half precision and an Ampere or newer GPU, which the recipe or "
            f"{shape} does not have"
        )
    return f"attention {attention} if its package is installed, else sdpa"


def _removable_keys(recipe: Recipe) -> list[str]:
    """Return hints to leave out keys of the recipe that take memory and do not change the training."""
    changes = []
    if recipe.engine:
        changes.append(f"leave out `engine: {recipe.engine}`")
    if recipe.offload == "none":
        changes.append("leave out `offload: none`")
    if checkpointing_of(recipe) is False:
        changes.append("leave out `gradient_checkpointing: false`")
    return changes


def _smaller_training(recipe: Recipe) -> list[str]:
    """Return a hint that changes the training, for when no other hardware and no other layout fits."""
    return ["take a shorter `max_length`"] if recipe.is_lora else ["train LoRA (`use_peft: true`)"]


def _find_larger_gpu(
    recipe: Recipe,
    shape: Shape,
    architecture: Architecture,
    sized: Sequence[SizedLayout],
    budget: MemoryBudget,
) -> list[str]:
    """Return the smallest GPU of the table, at the same count, that holds a layout; an empty list if none does."""
    needs = [candidate.gpu.gib for candidate in sized if candidate.host.gib <= budget.host]
    if not needs:
        return []
    for board in sorted(GPUS, key=lambda board: (board.usable_gib, board.fp16_tflops)):
        if not board.has_bf16 and needs_bf16(recipe, architecture):
            continue
        if board.usable_gib >= min(needs) and board.usable_gib > budget.gpu:
            return [f"{board.name}:{shape.count}"]
    return []


def _find_more_gpus(
    recipe: Recipe, shape: Shape, architecture: Architecture, budget: MemoryBudget
) -> list[str]:
    """Return the smallest count of the same GPU that holds a layout; an empty list if none does."""
    for count in range(shape.count + 1, MOST_GPUS + 1):
        share, rest = divmod(recipe.global_batch_size, count * shape.nodes)
        if rest or not share:
            continue
        larger = shape.model_copy(update={"count": count})
        candidates = size_layouts(recipe, larger, architecture, share, budget)
        if any(budget.holds(candidate) for candidate in candidates):
            return [str(larger)]
    return []

"""A fit's reasons, and why there is none, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainer.architecture import Architecture
from trainer.errors import NoFit
from trainer.fit.candidates import (
    LARGEST_MICRO_BATCH,
    WORTH,
    MemoryBudget,
    Timed,
    Tried,
    tries,
    way_of,
)
from trainer.fit.recipe_choices import attention_of, checkpointing_of
from trainer.fit.result import NAMES
from trainer.hardware import Shape
from trainer.hardware.table import GPUS
from trainer.memory import Usage
from trainer.memory.precision import needs_bf16
from trainer.recipe import Recipe

MOST_GPUS = 8
"""Of one node of the clouds that we rent from; more are not looked for."""


class Choice(NamedTuple):
    """What was chosen, of what, and in how much room."""

    best: Tried
    tried: tuple[Tried, ...]
    room: MemoryBudget
    paces: tuple[Timed, ...]
    """Of all that could be chosen, the best first."""


def reasons(choice: Choice, recipe: Recipe, shape: Shape, share: int) -> tuple[str, ...]:
    """Why each choice is as it is."""
    layout, room = choice.best.layout, choice.room
    accumulation = share // layout.micro_batch
    return (
        f"{layout.processes} process{'es, one for each GPU' if layout.processes > 1 else ''}",
        _why_engine(choice, recipe),
        _why_checkpointing(choice, recipe),
        _why_gpu_micro(choice, recipe, share),
        f"accumulation {accumulation}: {layout.processes} x {layout.micro_batch} x {accumulation} = {recipe.global_batch_size}",
        _why_attention(recipe, layout.attention, shape),
        f"GPU memory {choice.best.gpu.gib:.1f} of {room.gpu:.1f} GiB: {largest(choice.best.gpu)}",
        f"host memory {choice.best.host.gib:.0f} of {room.host:.0f} GiB: {largest(choice.best.host)}",
    )


def _why_engine(choice: Choice, recipe: Recipe) -> str:
    layout = choice.best.layout
    name = NAMES[layout.engine] + (", offloaded" if layout.offload_optimizer else "")
    if recipe.offload and layout.offload_optimizer:
        return f"{name}: `offload: {recipe.offload}`, as the recipe says"
    passed = _passed_over(choice)
    if recipe.engine:
        return f"{name}: `engine: {recipe.engine}`, as the recipe says" + (f"; {passed}" if passed else "")
    return f"{name}: {passed}" if passed else f"{name}: each GPU holds all that it needs"


def _passed_over(choice: Choice) -> str:
    """What the simpler ways would have taken: the memory of their smallest layout, or the time of their fastest."""
    ways = list(dict.fromkeys(each.way for each in choice.tried))
    said = []
    for other in ways[: ways.index(choice.best.way)]:
        name = f"{NAMES[other[0]]}{' offloaded' if other[1] else ''}"
        fastest = min((each.seconds for each in choice.paces if way_of(each.layout) == other), default=None)
        if fastest is not None:
            said.append(f"{name} takes {fastest:.3g} s a step")
            continue
        least = min((each for each in choice.tried if each.way == other), key=lambda each: each.gpu.gib)
        what = f"{least.gpu.gib:.0f} GiB of a GPU"
        if least.gpu.gib <= choice.room.gpu:
            what = f"{least.host.gib:.0f} GiB of the host"
        said.append(f"{name} needs {what}")
    return "; ".join(said)


def _why_checkpointing(choice: Choice, recipe: Recipe) -> str:
    on = choice.best.layout.activation_checkpointing
    state = "activation checkpointing" if on else "no activation checkpointing"
    if checkpointing_of(recipe) is not None:
        return f"{state}, as the recipe says"
    if not on:
        return f"{state}: all activations fit"
    without = [each for each in _same_way(choice) if not each.layout.activation_checkpointing]
    if not without:
        return f"{state}: without it no micro batch fits"
    fastest = min(without, key=lambda each: each.seconds)
    return f"{state}: it makes room for a larger micro batch; without it {_at(fastest)}"


def _same_way(choice: Choice) -> list[Timed]:
    return [each for each in choice.paces if way_of(each.layout) == choice.best.way]


def _at(each: Timed, *, checkpointing: bool = False) -> str:
    recomputed = " and checkpointing" if each.layout.activation_checkpointing and not checkpointing else ""
    return f"{each.seconds:.3g} s with {each.layout.micro_batch}{recomputed}"


def _why_gpu_micro(choice: Choice, recipe: Recipe, share: int) -> str:
    micro = choice.best.layout.micro_batch
    wish = recipe.micro_batch_size
    if wish == micro:
        return f"micro batch {micro}, as the recipe says"
    if wish and micro == share:
        return f"micro batch {micro}: a process's whole share"
    if wish:
        return f"micro batch {micro}: the largest up to the recipe's {wish} that divides a process's {share} and fits"
    return f"micro batch {micro}: {_against_others(choice)}"


def _against_others(choice: Choice) -> str:
    """Seconds of a step, and of the next smaller and larger micro batches that there are as well."""
    best, micro = choice.paces[0], choice.best.layout.micro_batch
    others = sorted(_same_way(choice), key=lambda each: each.layout.micro_batch)
    around = [
        *[each for each in others if each.layout.micro_batch < micro][-1:],
        *[each for each in others if each.layout.micro_batch > micro][:1],
    ]
    on = best.layout.activation_checkpointing
    said = ", ".join(
        [f"{best.seconds:.3g} s a step predicted", *(_at(each, checkpointing=on) for each in around)]
    )
    if any(each.seconds < best.seconds for each in around):
        return f"{said}; a doubling has to save {WORTH - 1:.0%}"
    return said


def why_micro(recipe: Recipe, *, share: int, micro: int) -> str:
    """On the CPU."""
    wish = recipe.micro_batch_size
    if wish == micro:
        return f"micro batch {micro}, as the recipe says"
    if wish:
        return f"micro batch {micro}: the recipe's {wish} does not divide a process's {share}"
    return f"micro batch {micro}: the largest up to {LARGEST_MICRO_BATCH} that divides a process's {share}"


def _why_attention(recipe: Recipe, attention: str, shape: Shape) -> str:
    wanted = attention_of(recipe)
    if wanted == attention:
        return f"attention {attention}, as the recipe says"
    if attention == "sdpa":
        return f"attention sdpa: FlashAttention 2 needs half precision on Ampere or newer, {shape} or the recipe is not"
    return f"attention {attention}, where the package is installed; else sdpa"


def largest(usage: Usage, count: int = 3) -> str:
    """The largest terms: `activations 31.2 GiB, optimizer 6.7 GiB`."""
    terms = sorted(usage.terms, key=lambda each: each.gib, reverse=True)[:count]
    return ", ".join(f"{each.name} {each.gib:.1f} GiB" for each in terms)


def uneven(recipe: Recipe, shape: Shape) -> NoFit:
    batch, count = recipe.global_batch_size, shape.gpus or shape.nodes
    what = "GPUs" if shape.gpus else "machines"
    counts = [size for size in range(1, batch + 1) if batch % size == 0]
    below = [size for size in counts if size <= count][-1:]
    above = [size for size in counts if size > count][:1]
    batches = [size for size in (batch // count * count, (batch // count + 1) * count) if size]
    return NoFit(
        f"recipe {recipe.name} has global_batch_size {batch}, which {count} {what} ({shape}) cannot share evenly",
        hint=f"take {' or '.join(str(size) for size in (*below, *above))} {what}, "
        f"or {' or '.join(f'`global_batch_size={size}`' for size in batches)}, which trains another model",
    )


def unknown(recipe: Recipe) -> NoFit:
    return NoFit(
        f"recipe {recipe.name}: nothing is known of the model {recipe.model_name_or_path}, so nor is its memory",
        hint="name a folder with its config.json, or let this machine reach the Hub",
    )


def no_bf16(recipe: Recipe, shape: Shape) -> NoFit:
    have = ", ".join(board.name for board in GPUS if board.has_bf16)
    other = "" if recipe.is_quantised else "; or `bf16=false fp16=true dtype=float16`, which trains otherwise"
    return NoFit(
        f"recipe {recipe.name} computes in bfloat16, which {shape} has not in hardware",
        hint=f"these have it: {have}{other}",
    )


def too_large(
    recipe: Recipe, shape: Shape, architecture: Architecture, tried: Sequence[Tried], room: MemoryBudget
) -> NoFit:
    """What the smallest layout needs, what is there, and the nearest that would do."""
    ways = [*_larger(recipe, shape, architecture, tried, room), *_more(recipe, shape, architecture, room)]
    on_gpu = [each for each in tried if each.gpu.gib <= room.gpu]
    if on_gpu:
        least = min(on_gpu, key=lambda each: each.host.gib)
        need = f"{least.host.gib:.0f} GiB of each host's memory; {shape} has {room.host:.0f} to give"
        return NoFit(
            f"recipe {recipe.name} needs {need} ({largest(least.host)})",
            hint=", or ".join(["take nodes with more memory", *ways, *_without(recipe)]),
        )
    least = min(tried, key=lambda each: each.gpu.gib)
    need = f"{least.gpu.gib:.1f} GiB of each GPU; {shape} has {room.gpu:.1f} to give"
    changes = _without(recipe) or ([] if ways else _smaller(recipe))
    return NoFit(
        f"recipe {recipe.name} needs {need} ({largest(least.gpu)})",
        hint=", or ".join([f"take {' or '.join(ways)}"] * bool(ways) + changes),
    )


def _without(recipe: Recipe) -> list[str]:
    """What the recipe asks for and could do without."""
    changes = []
    if recipe.engine:
        changes.append(f"leave out `engine: {recipe.engine}`")
    if recipe.offload == "none":
        changes.append("leave out `offload: none`")
    if checkpointing_of(recipe) is False:
        changes.append("leave out `gradient_checkpointing: false`")
    return changes


def _smaller(recipe: Recipe) -> list[str]:
    """What would be another recipe."""
    return ["take a shorter `max_length`"] if recipe.is_lora else ["train LoRA (`use_peft: true`)"]


def _larger(
    recipe: Recipe, shape: Shape, architecture: Architecture, tried: Sequence[Tried], room: MemoryBudget
) -> list[str]:
    needs = [each.gpu.gib for each in tried if each.host.gib <= room.host]
    if not needs:
        return []
    for board in sorted(GPUS, key=lambda board: (board.usable_gib, board.fp16_tflops)):
        if not board.has_bf16 and needs_bf16(recipe, architecture):
            continue
        if board.usable_gib >= min(needs) and board.usable_gib > room.gpu:
            return [f"{board.name}:{shape.count}"]
    return []


def _more(recipe: Recipe, shape: Shape, architecture: Architecture, room: MemoryBudget) -> list[str]:
    for count in range(shape.count + 1, MOST_GPUS + 1):
        share, rest = divmod(recipe.global_batch_size, count * shape.nodes)
        if rest or not share:
            continue
        larger = shape.model_copy(update={"count": count})
        if any(room.holds(each) for each in tries(recipe, larger, architecture, share, room)):
            return [str(larger)]
    return []

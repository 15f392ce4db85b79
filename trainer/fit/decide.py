"""The decision: of all layouts that a shape's memory holds, the one whose step is predicted to be the shortest."""

from __future__ import annotations

from trainer.architecture import Architecture
from trainer.errors import NoFit
from trainer.fit import reasons
from trainer.fit.candidates import (
    LARGEST_MICRO_BATCH,
    MemoryBudget,
    largest_divisor,
    taking,
    timed,
    tries,
)
from trainer.fit.recipe_choices import attention_of, checkpointing_of, engine_of, reference_of
from trainer.fit.result import NAMES, Fit
from trainer.hardware import Shape, gpu_of, has_bf16, usable_gib
from trainer.memory import Layout, Usage, predict_usage, predict_usage_with_staging
from trainer.memory.precision import needs_bf16
from trainer.recipe import Recipe

KEEP_SHARE = 0.5
"""Of a CPU's memory: the rest is for staged checkpoints, the page cache and whatever else a laptop runs."""
HOST_KEPT = 0.10
"""Own assumption: the share of a host's memory that is left to the system and to its cache of files."""


def fit(recipe: Recipe, shape: Shape, architecture: Architecture | None) -> Fit:
    """The fastest way to run a recipe that a shape's memory holds.

    Without the model's numbers a run on the CPU goes ahead, and its memory is said not to be known.

    Raises:
        NoFit: the global batch cannot be shared evenly, no layout fits, the hardware lacks what the recipe needs, or
            the model's numbers are not known; names what would do.
        RecipeError: the recipe does not limit the length of its sequences.
    """
    share, rest = divmod(recipe.global_batch_size, shape.gpus or shape.nodes)
    if rest or not share:
        raise reasons.uneven(recipe, shape)
    if shape.count == 0:
        return _on_cpu(recipe, shape, architecture)
    if architecture is None:
        raise reasons.unknown(recipe)
    if needs_bf16(recipe, architecture) and not has_bf16(gpu_of(shape)):
        raise reasons.no_bf16(recipe, shape)
    room = MemoryBudget(usable_gib(shape) or 0.0, shape.host_memory_gib * (1 - HOST_KEPT))
    tried = list(tries(recipe, shape, architecture, share, room))
    fitting = [each for each in tried if room.holds(each)]
    if not fitting:
        raise reasons.too_large(recipe, shape, architecture, tried, room)
    paces = timed(fitting, recipe, shape, architecture)
    sized = (taking(recipe, shape, architecture, each.layout) for each in paces)
    at, best = next((at, tried) for at, tried in enumerate(sized) if room.holds(tried))
    return _chosen(reasons.Choice(best, tuple(tried), room, paces[at:]), recipe, shape, architecture)


def _chosen(choice: reasons.Choice, recipe: Recipe, shape: Shape, architecture: Architecture) -> Fit:
    best, layout, share = choice.best, choice.best.layout, recipe.global_batch_size // shape.gpus
    staged = predict_usage_with_staging(recipe, architecture, layout)
    in_memory = staged.gib <= choice.room.host
    threads = max(1, shape.cores // layout.processes_per_node)
    return Fit(
        **layout.model_dump(),
        accumulation=share // layout.micro_batch,
        threads=threads,
        use_cpu=False,
        gpu=best.gpu,
        host=staged if in_memory else best.host,
        reasons=(
            *reasons.reasons(choice, recipe, shape, share),
            f"{threads} threads each: {shape.cores} cores for {layout.processes_per_node}",
            f"checkpoints wait {'in memory' if in_memory else 'on disk'}: {staged.gib_of('staging'):.0f} GiB of them",
        ),
    )


def _on_cpu(recipe: Recipe, shape: Shape, architecture: Architecture | None) -> Fit:
    """One process a node with all its cores, as the recipe says; where it is silent, activations are kept if that
    takes no more than `KEEP_SHARE` of the memory.
    """
    nodes = shape.nodes
    share = recipe.global_batch_size // nodes
    micro = largest_divisor(share, at_most=recipe.micro_batch_size or LARGEST_MICRO_BATCH)
    layout = Layout(
        processes=nodes,
        nodes=nodes,
        micro_batch=micro,
        engine=engine_of(recipe, several=nodes > 1),
        attention=attention_of(recipe) or "sdpa",
        activation_checkpointing=checkpointing_of(recipe) is not False,  # TRL's default is on
        reference=reference_of(recipe),
    )
    host = _cpu_memory(recipe, architecture, layout)
    roomy: tuple[str, ...] = ()
    if checkpointing_of(recipe) is None:
        kept = layout.model_copy(update={"activation_checkpointing": False})
        fuller = _cpu_memory(recipe, architecture, kept)
        if fuller.terms and fuller.gib <= KEEP_SHARE * shape.host_memory_gib:
            layout, host = kept, fuller
            roomy = ("no activation checkpointing: all activations fit",)
    if host.gib > shape.host_memory_gib:
        raise NoFit(
            f"recipe {recipe.name} needs {host.gib:.1f} GiB of memory; {shape} has no more",
            hint=f"most of it: {reasons.largest(host)}; take a smaller `micro_batch_size`, LoRA, or a GPU",
        )
    known = f"memory: {host.gib:.1f} of {shape.host_memory_gib:.0f} GiB" if host.terms else None
    return Fit(
        **layout.model_dump(),
        accumulation=share // micro,
        threads=shape.cores,
        use_cpu=True,
        host=host,
        reasons=(
            "1 process" if nodes == 1 else f"{nodes} processes, one for each node",
            *(
                [f"{NAMES[layout.engine]}: `engine: {recipe.engine}`, as the recipe says"]
                * bool(recipe.engine)
            ),
            reasons.why_micro(recipe, share=share, micro=micro),
            f"accumulation {share // micro}: {nodes} x {micro} x {share // micro} = {recipe.global_batch_size}",
            f"{shape.cores} threads each: {shape.cores} cores for 1",
            *roomy,
            known or "memory: not predicted, as the model's numbers or the sequences' length are not known",
        ),
    )


def _cpu_memory(recipe: Recipe, architecture: Architecture | None, layout: Layout) -> Usage:
    if architecture is None or recipe.trainer_args.get("max_length", 1) is None:
        return Usage()
    return predict_usage(recipe, architecture, layout, has_bf16=False, on_cpu=True)[1]

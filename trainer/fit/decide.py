"""The choice of a fit: of all layouts that fit into a shape's memory, the one with the shortest predicted step."""

from __future__ import annotations

from trainer.architecture import Architecture
from trainer.errors import NoFit
from trainer.estimate.traffic import DISK_BYTES_PER_S, STAGING_BYTES_PER_S
from trainer.fit import reasons
from trainer.fit.candidates import (
    LARGEST_MICRO_BATCH,
    MemoryBudget,
    find_largest_divisor,
    size_layout,
    size_layouts,
    time_layouts,
)
from trainer.fit.recipe_choices import attention_of, checkpointing_of, engine_of, reference_of
from trainer.hardware import Shape, gpu_of, has_bf16, usable_gib
from trainer.memory import Layout, Usage, checkpoint_bytes, predict_usage, predict_usage_with_staging
from trainer.memory.layout import ENGINE_TITLES
from trainer.memory.precision import needs_bf16
from trainer.recipe import Recipe

KEEP_SHARE = 0.5
"""Largest part of a CPU machine's memory to spend on keeping activations. The rest is for staged checkpoints, the page cache
and the other programs of a laptop."""
HOST_RESERVE = 0.10
"""Own assumption: the part of a host's memory that is left to the system and its page cache."""


class Fit(Layout):
    """How a recipe runs: `processes` x `micro_batch` x `accumulation` is exactly the recipe's global batch."""

    accumulation: int
    """Micro batches per optimizer step and process."""
    threads: int
    """CPU threads per process. A resume is exact only with the same number."""
    use_cpu: bool
    gpu: Usage = Usage()
    """Predicted peak of each GPU; no terms on the CPU."""
    host: Usage = Usage()
    """Predicted peak of each node's host memory; no terms if the architecture is unknown."""
    reasons: tuple[str, ...]

    @property
    def offloaded_gib(self) -> float:
        """GiB of each node's host memory that hold DeepSpeed's offloaded state."""
        return sum(term.gib for term in self.host.terms if term.name.startswith("offloaded"))

    def words(self) -> str:
        """Return the fit as text for a table, such as `ZeRO-3, micro batch 4 x 2, no offload`."""
        batch = f"micro batch {self.micro_batch} x {self.accumulation}"
        if self.use_cpu:
            return ", ".join(["CPU", *[ENGINE_TITLES[self.engine]] * self.is_sharded, batch])
        recomputed = [] if self.activation_checkpointing else ["no checkpointing"]
        return ", ".join([ENGINE_TITLES[self.engine], batch, *recomputed, self.offload_words()])

    def offload_words(self) -> str:
        """Return what is offloaded, as text."""
        if self.offload_parameters:
            return "optimizer and parameters offloaded"
        return "optimizer offloaded" if self.offload_optimizer else "no offload"


def fit(recipe: Recipe, shape: Shape, architecture: Architecture | None) -> Fit:
    """Return the fastest way to run a recipe within a shape's memory.

    A run on the CPU needs no architecture. Without one its memory is not predicted.

    Raises:
        NoFit: the global batch cannot be shared evenly, no layout fits, the hardware lacks what the recipe needs, or
            the architecture is unknown. The hint names what would fit.
        RecipeError: the recipe does not limit the length of its sequences.
    """
    share, rest = divmod(recipe.global_batch_size, shape.gpus or shape.nodes)
    if rest or not share:
        raise reasons.uneven_batch(recipe, shape)
    if shape.count == 0:
        return _fit_cpu(recipe, shape, architecture)
    if architecture is None:
        raise reasons.unknown_architecture(recipe)
    if needs_bf16(recipe, architecture) and not has_bf16(gpu_of(shape)):
        raise reasons.no_bf16(recipe, shape)
    budget = MemoryBudget(usable_gib(shape) or 0.0, shape.host_memory_gib * (1 - HOST_RESERVE))
    sized = list(size_layouts(recipe, shape, architecture, share, budget))
    fitting = [candidate for candidate in sized if budget.holds(candidate)]
    if not fitting:
        raise reasons.too_large(recipe, shape, architecture, sized, budget)
    timed = time_layouts(fitting, recipe, shape, architecture)
    # a smaller micro batch of a fitting layout nearly always fits, but only its own size proves it
    resized = (size_layout(recipe, shape, architecture, candidate.layout) for candidate in timed)
    at, best = next((at, candidate) for at, candidate in enumerate(resized) if budget.holds(candidate))
    return _make_fit(reasons.Choice(best, tuple(sized), budget, timed[at:]), recipe, shape, architecture)


def _make_fit(choice: reasons.Choice, recipe: Recipe, shape: Shape, architecture: Architecture) -> Fit:
    best, layout, share = choice.best, choice.best.layout, recipe.global_batch_size // shape.gpus
    staged = predict_usage_with_staging(recipe, architecture, layout)
    in_memory = staged.gib <= choice.budget.host
    threads = max(1, shape.cores // layout.processes_per_node)
    return Fit(
        **layout.model_dump(),
        accumulation=share // layout.micro_batch,
        threads=threads,
        use_cpu=False,
        gpu=best.gpu,
        host=staged if in_memory else best.host,
        reasons=(
            *reasons.list_reasons(choice, recipe, shape, share),
            f"{threads} threads per process: {shape.cores} cores for {layout.processes_per_node}",
            _staging_reason(recipe, architecture, layout, staged.gib_of("staging"), in_memory=in_memory),
        ),
    )


def _staging_reason(
    recipe: Recipe, architecture: Architecture, layout: Layout, gib: float, *, in_memory: bool
) -> str:
    """Return where checkpoints are staged, and how long a save stops the training."""
    size = checkpoint_bytes(recipe, architecture, layout)
    if in_memory:
        stall_s = size / layout.processes / STAGING_BYTES_PER_S
        return f"checkpoints are staged in memory: up to {gib:.0f} GiB; a save stops training for some {stall_s:.1f} s"
    stall_s = size / layout.nodes / DISK_BYTES_PER_S
    return (
        f"checkpoints are staged on disk, because {gib:.0f} GiB do not fit into memory; a save stops training for "
        f"some {stall_s:.0f} s on a cloud disk with {DISK_BYTES_PER_S / 1e9:.2f} GB/s"
    )


def _fit_cpu(recipe: Recipe, shape: Shape, architecture: Architecture | None) -> Fit:
    """Return the fit on the CPU: one process per node, with all of its cores.

    If the recipe does not set activation checkpointing, it is off where all activations fit into `KEEP_SHARE` of the
    memory.
    """
    nodes = shape.nodes
    share = recipe.global_batch_size // nodes
    micro = find_largest_divisor(share, at_most=recipe.micro_batch_size or LARGEST_MICRO_BATCH)
    layout = Layout(
        processes=nodes,
        nodes=nodes,
        micro_batch=micro,
        engine=engine_of(recipe, several=nodes > 1),
        attention=attention_of(recipe) or "sdpa",
        activation_checkpointing=checkpointing_of(recipe) is not False,  # TRL's default is on
        reference=reference_of(recipe),
    )
    host = _predict_cpu_memory(recipe, architecture, layout)
    why_checkpointing: tuple[str, ...] = ()
    if checkpointing_of(recipe) is None:
        without = layout.model_copy(update={"activation_checkpointing": False})
        host_without = _predict_cpu_memory(recipe, architecture, without)
        if host_without.terms and host_without.gib <= KEEP_SHARE * shape.host_memory_gib:
            layout, host = without, host_without
            why_checkpointing = ("no activation checkpointing: all activations fit",)
    if host.gib > shape.host_memory_gib:
        raise NoFit(
            f"recipe {recipe.name} needs {host.gib:.1f} GiB of memory; {shape} has less",
            hint=f"most of it: {reasons.list_largest(host)}; take a smaller `micro_batch_size`, LoRA, or a GPU",
        )
    known = f"memory: {host.gib:.1f} of {shape.host_memory_gib:.0f} GiB" if host.terms else None
    return Fit(
        **layout.model_dump(),
        accumulation=share // micro,
        threads=shape.cores,
        use_cpu=True,
        host=host,
        reasons=(
            "1 process" if nodes == 1 else f"{nodes} processes, one per node",
            *(
                [f"{ENGINE_TITLES[layout.engine]}: set by the recipe (`engine: {recipe.engine}`)"]
                * bool(recipe.engine)
            ),
            reasons.why_cpu_micro_batch(recipe, share=share, micro=micro),
            f"accumulation {share // micro}: {nodes} x {micro} x {share // micro} = {recipe.global_batch_size}",
            f"{shape.cores} threads per process: {shape.cores} cores for 1",
            *why_checkpointing,
            known or "memory: not predicted, because the architecture or the maximum length is unknown",
        ),
    )


def _predict_cpu_memory(recipe: Recipe, architecture: Architecture | None, layout: Layout) -> Usage:
    """Return the memory of a run on the CPU; no terms if it cannot be predicted."""
    if architecture is None or recipe.trainer_args.get("max_length", 1) is None:
        return Usage()
    return predict_usage(recipe, architecture, layout, has_bf16=False, on_cpu=True)[1]

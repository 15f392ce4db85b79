"""How a recipe runs on a shape: a pure decision, each choice with its reason."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from trainer.errors import NoFit
from trainer.hardware import Shape
from trainer.recipe import Recipe

LARGEST_MICRO_BATCH = 8


class Fit(BaseModel):
    """How to run: `processes` x `micro_batch` x `accumulation` is the recipe's global batch, exactly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processes: int
    """One for each GPU, or one on the CPU."""
    micro_batch: int
    """Sequences or pairs that a process takes at a time."""
    accumulation: int
    """Micro batches to an optimizer step."""
    threads: int
    """Of the CPU, for each process; a resume is exact only with as many as before."""
    use_cpu: bool
    reasons: tuple[str, ...]


def fit(recipe: Recipe, shape: Shape) -> Fit:
    """Split the global batch over the shape's GPUs, or give it to the CPU.

    Decides the micro batch by divisibility alone; memory is not looked at.

    Raises:
        NoFit: the global batch cannot be shared evenly; names the nearest counts and batches that can.
    """
    processes = max(shape.count, 1)
    share, rest = divmod(recipe.global_batch_size, processes)
    if rest or not share:
        raise _uneven(recipe, shape)
    micro = _largest_divisor(share, at_most=recipe.micro_batch_size or LARGEST_MICRO_BATCH)
    threads = max(1, shape.cores // processes)
    return Fit(
        processes=processes,
        micro_batch=micro,
        accumulation=share // micro,
        threads=threads,
        use_cpu=shape.count == 0,
        reasons=(
            f"{processes} process{'es, one for each GPU' if processes > 1 else ''}",
            _why(recipe, share=share, micro=micro),
            f"accumulation {share // micro}: {processes} x {micro} x {share // micro} = {recipe.global_batch_size}",
            f"{threads} threads each: {shape.cores} cores for {processes}",
        ),
    )


def _largest_divisor(whole: int, *, at_most: int) -> int:
    return max(size for size in range(1, min(whole, at_most) + 1) if whole % size == 0)


def _why(recipe: Recipe, *, share: int, micro: int) -> str:
    wish = recipe.micro_batch_size
    if wish == micro:
        return f"micro batch {micro}, as the recipe says"
    if wish:
        return f"micro batch {micro}: the recipe's {wish} does not divide a process's {share}"
    return f"micro batch {micro}: the largest up to {LARGEST_MICRO_BATCH} that divides a process's {share}"


def _uneven(recipe: Recipe, shape: Shape) -> NoFit:
    batch, count = recipe.global_batch_size, shape.count
    counts = [size for size in range(1, batch + 1) if batch % size == 0]
    below = [size for size in counts if size <= count][-1:]
    above = [size for size in counts if size > count][:1]
    batches = [size for size in (batch // count * count, (batch // count + 1) * count) if size]
    return NoFit(
        f"recipe {recipe.name} has global_batch_size {batch}, which {count} GPUs ({shape}) cannot share evenly",
        hint=f"take {' or '.join(str(size) for size in (*below, *above))} GPUs, "
        f"or {' or '.join(f'`global_batch_size={size}`' for size in batches)}, which trains another model",
    )

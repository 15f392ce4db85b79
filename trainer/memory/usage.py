"""The peak of a GPU and of a host, as the sum of their terms."""

from __future__ import annotations

from trainer.architecture.architecture import Architecture
from trainer.errors import RecipeError
from trainer.memory import host as hosts
from trainer.memory import resident, transients
from trainer.memory.activations import TokenBatch, activations
from trainer.memory.layout import GIB, Layout, Term, Usage, term
from trainer.memory.resident import Case
from trainer.recipe import Recipe

CONTEXT_GIB = 1.0
"""Own assumption: CUDA's context, kernels as they are loaded, cuBLAS' work space. 1.3 GB were seen before kernels were
loaded lazily: https://huggingface.co/docs/transformers/model_memory_anatomy"""
FRAGMENTATION = 0.15
"""Of what comes and goes. Measured in mean over eight language models with torch's allocator: GMLake (arXiv:2401.08156,
abstract); `PYTORCH_ALLOC_CONF=expandable_segments:True` makes it less."""
DEFAULT_LENGTH = 1024
"""TRL's `max_length`, if the recipe is silent."""


def usage(
    recipe: Recipe, architecture: Architecture, layout: Layout, *, has_bf16: bool = True, on_cpu: bool = False
) -> tuple[Usage, Usage]:
    """What each GPU and each host takes at its peak; on the CPU all of it is the host's.

    Raises:
        RecipeError: the recipe does not limit the length of its sequences.
    """
    case = Case.of(recipe, architecture, layout, has_bf16=has_bf16, on_cpu=on_cpu)
    device, host = Usage.of(device_terms(case)), hosts.host(case)
    if on_cpu:
        kept = [each for each in host.terms if each.name == "processes"]
        return Usage(), Usage.of((*kept, *device.terms))
    return device, host


def staged_host(recipe: Recipe, architecture: Architecture, layout: Layout) -> Usage:
    """What each host takes if checkpoints wait in its memory for their upload, which the supervisor chooses where
    there is room, and the disk else.
    """
    return hosts.host(Case.of(recipe, architecture, layout), staged=True)


def checkpoint_bytes(recipe: Recipe, architecture: Architecture, layout: Layout) -> int:
    """Size of one checkpoint."""
    return int(hosts.checkpoint_size(Case.of(recipe, architecture, layout)))


def tokens_of(case: Case) -> TokenBatch:
    """The longest batch: every sequence as long as the recipe lets it be.

    Raises:
        RecipeError: it lets it be of any length.
    """
    length = case.recipe.trainer_args.get("max_length", DEFAULT_LENGTH)
    if length is None:
        raise RecipeError(
            f"recipe {case.recipe.name} has `max_length: null`, so its longest example decides its memory",
            hint="say `max_length: 1024`, or what your data need",
        )
    return TokenBatch(case.sequences, int(length))


def device_terms(case: Case) -> tuple[Term, ...]:
    """Of one GPU: what it always holds, then the worst moment of a step."""
    held = (
        resident.parameters(case),
        resident.adapter(case),
        resident.gradients(case),
        resident.masters(case),
        resident.optimizer(case),
        resident.reference(case),
    )
    moving = (transients.gathered(case), transients.buckets(case), *worst_moment(case))
    if case.on_cpu:
        return (*held, *moving)
    loose = FRAGMENTATION * sum(each.bytes for each in moving)
    return (
        *held,
        *moving,
        term("CUDA", CONTEXT_GIB * GIB, "context, kernels, cuBLAS: own assumption"),
        transients.nccl(case),
        term("fragmentation", loose, f"{FRAGMENTATION:.0%} of what comes and goes (arXiv:2401.08156)"),
    )


def worst_moment(case: Case) -> tuple[Term, Term]:
    """Activations, and the most that is there beside them; or the optimizer's step, if that is more than both."""
    tokens, padded = tokens_of(case), is_padded(case.recipe)
    saved = activations(case, tokens, padded=padded)
    kept = term(
        saved.name,
        saved.bytes + transients.saved_head_bytes(case, tokens),
        saved.why + ", and the head's input",
    )
    moments = (
        transients.end_of_forward(case, tokens),
        transients.head(case, tokens),
        transients.layer(case, tokens, padded=padded),
        transients.reference_pass(case, tokens),
    )
    widest = max(moments, key=lambda moment: moment.gib)
    stepping = transients.step(case)
    if stepping.gib > kept.gib + widest.gib:
        return term(kept.name, 0, kept.why), stepping
    return kept, widest


def is_padded(recipe: Recipe) -> bool:
    """Whether batches have sequences of unlike lengths, which take a mask; packed ones have none."""
    return not recipe.is_packed

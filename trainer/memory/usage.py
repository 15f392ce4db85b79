"""The predicted peak memory of each GPU and of each host, as the sum of its terms.

The host's terms are in this file: the processes, loading, offloaded state, and staged checkpoints. They count one node.
"""

from __future__ import annotations

from trainer.architecture.architecture import Architecture
from trainer.errors import RecipeError
from trainer.memory import resident, transients
from trainer.memory.activations import TokenBatch, predict_activations
from trainer.memory.layout import GIB, Layout, Term, Usage, make_term
from trainer.memory.precision import BYTES, loaded_dtype
from trainer.memory.resident import Case, reference_bytes
from trainer.memory.transients import SUB_GROUP
from trainer.recipe import Recipe

CONTEXT_GIB = 1.0
"""Own assumption: CUDA's context, loaded kernels, and cuBLAS' work space. It was 1.3 GB before kernels were loaded
lazily: https://huggingface.co/docs/transformers/model_memory_anatomy"""
FRAGMENTATION = 0.15
"""Part of the transient memory that fragmentation adds. It is the mean over eight language models with torch's
allocator: GMLake (arXiv:2401.08156, abstract). `PYTORCH_ALLOC_CONF=expandable_segments:True` makes it less."""
DEFAULT_LENGTH = 1024
"""TRL's `max_length`, for a recipe that does not set it."""
PROCESS_GIB = 4.0
"""Own assumption for a process on a GPU: Python, torch, CUDA's libraries and mappings, data loader workers."""
CPU_PROCESS_GIB = 1.0
"""For a process on the CPU. We measured 0.5 GiB with torch, Transformers, PEFT, datasets and TRL imported. The same
again for data and for the kernels' needs is our assumption."""
SUPERVISOR_GIB = 0.5
"""Own assumption: the supervisor, with an upload in flight."""
SHARD_BYTES = 5 * 10**9
"""Bytes of a file of weights, which is read at once. `save_pretrained` used this size for years
(https://huggingface.co/docs/transformers/big_models)."""
STAGED = 3
"""Buffers for checkpoints in memory. Two are used in turn; the third one is needed if a run is stopped while one
checkpoint is being uploaded and another one waits."""


def predict_usage(
    recipe: Recipe, architecture: Architecture, layout: Layout, *, has_bf16: bool = True, on_cpu: bool = False
) -> tuple[Usage, Usage]:
    """Return the peak of each GPU and of each host. On the CPU, everything counts as the host's.

    Raises:
        RecipeError: the recipe does not limit the length of its sequences.
    """
    case = Case.of(recipe, architecture, layout, has_bf16=has_bf16, on_cpu=on_cpu)
    device, host = Usage.of(list_device_terms(case)), predict_host(case)
    if on_cpu:
        processes = [term for term in host.terms if term.name == "processes"]
        return Usage(), Usage.of((*processes, *device.terms))
    return device, host


def predict_usage_with_staging(recipe: Recipe, architecture: Architecture, layout: Layout) -> Usage:
    """Return the peak of each host if checkpoints wait in its memory for their upload.

    The supervisor stages checkpoints in memory if there is room, else on disk.
    """
    return predict_host(Case.of(recipe, architecture, layout), staged=True)


def checkpoint_bytes(recipe: Recipe, architecture: Architecture, layout: Layout) -> int:
    """Return the bytes of one checkpoint."""
    return int(checkpoint_size(Case.of(recipe, architecture, layout)))


def longest_batch(case: Case) -> TokenBatch:
    """Return the largest batch: every sequence has the recipe's maximum length.

    Raises:
        RecipeError: the recipe does not limit the length.
    """
    length = case.recipe.trainer_args.get("max_length", DEFAULT_LENGTH)
    if length is None:
        raise RecipeError(
            f"recipe {case.recipe.name} has `max_length: null`: its longest example decides how much memory it "
            "needs, so the need cannot be predicted",
            hint="set `max_length: 1024`, or the length that your data need",
        )
    return TokenBatch(case.sequences, int(length))


def list_device_terms(case: Case) -> tuple[Term, ...]:
    """Return the terms of one GPU: its resident memory, then the most demanding moment of a step."""
    held = (
        resident.predict_parameters(case),
        resident.predict_adapter(case),
        resident.predict_gradients(case),
        resident.predict_masters(case),
        resident.predict_optimizer(case),
        resident.predict_reference(case),
    )
    moving = (
        transients.predict_gathered(case),
        transients.predict_buckets(case),
        *find_worst_moment(case),
    )
    if case.on_cpu:
        return (*held, *moving)
    fragmented = FRAGMENTATION * sum(term.bytes for term in moving)
    return (
        *held,
        *moving,
        make_term("CUDA", CONTEXT_GIB * GIB, "context, kernels, cuBLAS: own assumption"),
        transients.predict_nccl(case),
        make_term(
            "fragmentation", fragmented, f"{FRAGMENTATION:.0%} of the transient memory (arXiv:2401.08156)"
        ),
    )


def find_worst_moment(case: Case) -> tuple[Term, Term]:
    """Return the activations, and the largest transient beside them.

    If the optimizer's step takes more than both, return no activations and the step.
    """
    tokens, padded = longest_batch(case), is_padded(case.recipe)
    saved = predict_activations(case, tokens, padded=padded)
    activations = make_term(
        saved.name,
        saved.bytes + transients.saved_head_bytes(case, tokens),
        saved.why + ", and the head's input",
    )
    moments = (
        transients.predict_forward_end(case, tokens),
        transients.predict_head(case, tokens),
        transients.predict_layer(case, tokens, padded=padded),
        transients.predict_reference_pass(case, tokens),
    )
    largest = max(moments, key=lambda moment: moment.gib)
    step = transients.predict_step(case)
    if step.gib > activations.gib + largest.gib:
        return make_term(activations.name, 0, activations.why), step
    return activations, largest


def is_padded(recipe: Recipe) -> bool:
    """Whether sequences of a batch differ in length, which needs a mask. Packed batches have no mask."""
    return not recipe.is_packed


def predict_host(case: Case, *, staged: bool = False) -> Usage:
    """Return the peak of a node's host memory.

    Loading is over before training fills the memory, so it counts only where it exceeds the other terms.

    Args:
        case: the recipe on its layout.
        staged: whether checkpoints are staged in memory.
    """
    held = (*list_offloaded(case), *([predict_staging(case)] if staged else []))
    loading = predict_loading(case)
    beyond = max(0.0, loading.bytes - sum(term.bytes for term in held))
    return Usage.of((predict_processes(case), *held, make_term(loading.name, beyond, loading.why)))


def predict_processes(case: Case) -> Term:
    """Return the term of the training processes and the supervisor."""
    count = case.layout.processes_per_node
    each = CPU_PROCESS_GIB if case.on_cpu else PROCESS_GIB
    why = f"{count} x {each} GiB, and {SUPERVISOR_GIB} GiB for the supervisor"
    return make_term("processes", (count * each + SUPERVISOR_GIB) * GIB, why)


def predict_loading(case: Case) -> Term:
    """Return the term of the models while they are loaded.

    Every process loads its own copy into host memory, and the reference beside the policy. Quantised models go to
    the GPU one file at a time.
    """
    count = case.layout.processes_per_node
    models = 2 if case.layout.reference == "model" else 1
    size = case.architecture.parameters * float(_loaded_bytes(case))
    if case.recipe.is_quantised:
        size = min(size, SHARD_BYTES)
    why = (
        f"{count} processes x {models} x {size / GIB:,.1f} GiB while loading, of which this is the part that "
        "exceeds the other terms"
    )
    return make_term("loading", count * models * size, why)


def list_offloaded(case: Case) -> tuple[Term, ...]:
    """Return the terms of the state that DeepSpeed keeps on the host, over all processes of the node.

    https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/zero/stage3.py (`_create_fp32_partitions`,
    `initialize_optimizer_states`, `grad_partitions_flat_buffer`)
    """
    layout, precision = case.layout, case.precision
    if not layout.offload_optimizer:
        return ()
    share = case.trained / layout.processes
    count = layout.processes_per_node
    each = precision.masters + case.optimizer.state_bytes(case.stepped_bytes)
    state = make_term(
        "offloaded optimizer",
        count * share * each,
        f"{count} x {share / 1e9:,.3f} billion x {each:.3g} bytes",
    )
    # gradients are in float32, a sub-group at a time, and in half precision in one buffer
    float32 = _pinned_bytes(min(share, SUB_GROUP) * 4.0) * max(1.0, share / SUB_GROUP)
    half = _pinned_bytes(share * precision.gradients)
    why = (
        f"{count} x {share / 1e9:,.3f} billion x (4 + {precision.gradients}) bytes, rounded up because pinned"
    )
    return (state, make_term("offloaded gradients", count * (float32 + half), why), *_list_parameters(case))


def _list_parameters(case: Case) -> tuple[Term, ...]:
    """Return the term of the offloaded parameters, if they are offloaded."""
    layout = case.layout
    if not layout.offload_parameters:
        return ()
    models = {"policy": case.architecture.parameters * float(case.precision.weights)}
    if layout.reference == "model":
        models["reference"] = case.architecture.parameters * float(reference_bytes(case))
    count = layout.processes_per_node
    size = sum(_pinned_bytes(each / layout.processes) for each in models.values())
    why = f"{' and '.join(models)}, {count} of {layout.processes} shards, rounded up because pinned"
    return (make_term("offloaded parameters", count * size, why),)


def checkpoint_size(case: Case) -> float:
    """Return the bytes of one checkpoint over all nodes: the masters, or the weights without masters, and the optimizer."""
    weights = case.precision.masters or case.precision.trained
    return case.trained * (weights + case.optimizer.state_bytes(case.stepped_bytes))


def predict_staging(case: Case) -> Term:
    """Return the term of the checkpoints that wait in memory for their upload."""
    size = STAGED * checkpoint_size(case) / case.layout.nodes
    why = f"{STAGED} checkpoints of {checkpoint_size(case) / 1e9:,.1f} GB in memory"
    return make_term("staging", size, why)


def _loaded_bytes(case: Case) -> int:
    """Return the bytes per weight while the model is loaded."""
    loaded = BYTES[loaded_dtype(case.recipe, case.architecture)]
    return loaded if case.lora or case.layout.is_zero else max(loaded, case.precision.weights)


def _pinned_bytes(size: float) -> float:
    """Round up to a power of two, as torch does for pinned memory:
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/core/CachingHostAllocator.h
    """
    return float(2 ** max(0, int(size) - 1).bit_length()) if size else 0.0

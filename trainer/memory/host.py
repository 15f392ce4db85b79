"""What a host holds: its processes, what is offloaded to it, and what passes through it; of one node."""

from __future__ import annotations

from trainer.memory.layout import GIB, Term, Usage, term
from trainer.memory.precision import BYTES, loaded_dtype
from trainer.memory.resident import Case, reference_bytes
from trainer.memory.transients import SUB_GROUP

PROCESS_GIB = 4.0
"""Own assumption, of a process on a GPU: Python, torch, CUDA's libraries and mappings, workers of the data loader."""
CPU_PROCESS_GIB = 1.0
"""Of a process on the CPU: 0.5 GiB were seen with torch, Transformers, PEFT, datasets and TRL imported; as much again
for data and what kernels need is our assumption."""
SUPERVISOR_GIB = 0.5
"""Own assumption: the supervisor, with an upload in flight."""
SHARD_BYTES = 5 * 10**9
"""A file of weights, read at once: what `save_pretrained` cut them into for years
(https://huggingface.co/docs/transformers/big_models)."""
STAGED = 3
"""Checkpoints in staging at once: one being uploaded, one waiting, one being written."""


def host(case: Case, *, staged: bool = False) -> Usage:
    """The peak of a node: what training keeps, with checkpoints `staged` in memory or not, and what loading needs
    beyond that, earlier.
    """
    kept = (*offload(case), *([staging(case)] if staged else []))
    loading = load(case)
    beyond = max(0.0, loading.bytes - sum(each.bytes for each in kept))
    return Usage.of((processes(case), *kept, term(loading.name, beyond, loading.why)))


def processes(case: Case) -> Term:
    count = case.layout.processes_per_node
    each = CPU_PROCESS_GIB if case.on_cpu else PROCESS_GIB
    why = f"{count} x {each} GiB and the supervisor's {SUPERVISOR_GIB}"
    return term("processes", (count * each + SUPERVISOR_GIB) * GIB, why)


def load(case: Case) -> Term:
    """Models as they are read: every process has its own, on the host first, the reference beside the policy.

    Quantised ones go to the GPU a file at a time.
    """
    count = case.layout.processes_per_node
    models = 2 if case.layout.reference == "model" else 1
    size = case.architecture.parameters * float(_read_bytes(case))
    if case.recipe.is_quantised:
        size = min(size, SHARD_BYTES)
    why = f"{count} processes x {models} x {size / GIB:,.1f} GiB before they are on the GPUs; here what is beyond the rest"
    return term("loading", count * models * size, why)


def offload(case: Case) -> tuple[Term, ...]:
    """What DeepSpeed keeps on the host, over all processes of the node.

    https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/zero/stage3.py (`_create_fp32_partitions`,
    `initialize_optimizer_states`, `grad_partitions_flat_buffer`)
    """
    layout, precision = case.layout, case.precision
    if not layout.offload_optimizer:
        return ()
    share = case.trained / layout.processes
    count = layout.processes_per_node
    each = precision.masters + case.optimizer.state_bytes(case.stepped_bytes)
    state = term(
        "offloaded optimizer",
        count * share * each,
        f"{count} x {share / 1e9:,.3f} billion x {each:.3g} bytes",
    )
    float32 = _pinned(min(share, SUB_GROUP) * 4.0) * max(1.0, share / SUB_GROUP)
    kept = _pinned(share * precision.gradients)
    why = f"{count} x {share / 1e9:,.3f} billion x (4 + {precision.gradients}) bytes, pinned, so rounded up"
    return (state, term("offloaded gradients", count * (float32 + kept), why), *_offloaded_parameters(case))


def _offloaded_parameters(case: Case) -> tuple[Term, ...]:
    layout = case.layout
    if not layout.offload_parameters:
        return ()
    models = {"policy": case.architecture.parameters * float(case.precision.weights)}
    if layout.reference == "model":
        models["reference"] = case.architecture.parameters * float(reference_bytes(case))
    count = layout.processes_per_node
    size = sum(_pinned(each / layout.processes) for each in models.values())
    why = f"{' and '.join(models)}, {count} parts of {layout.processes}, pinned, so rounded up"
    return (term("offloaded parameters", count * size, why),)


def checkpoint_size(case: Case) -> float:
    """Bytes of one checkpoint over all nodes: weights, and what the optimizer needs to go on."""
    state = case.optimizer.state_bytes(case.stepped_bytes) + case.precision.masters
    return case.trained * (case.precision.trained + state)


def staging(case: Case) -> Term:
    """Checkpoints that wait in memory for their upload; the supervisor takes the disk where there is no room."""
    size = STAGED * checkpoint_size(case) / case.layout.nodes
    return term("staging", size, f"{STAGED} checkpoints of {checkpoint_size(case) / 1e9:,.1f} GB in memory")


def _read_bytes(case: Case) -> int:
    """Of a weight, as it is read."""
    loaded = BYTES[loaded_dtype(case.recipe, case.architecture)]
    return loaded if case.lora or case.layout.is_zero else max(loaded, case.precision.weights)


def _pinned(size: float) -> float:
    """Rounded up to a power of two, as torch pins it :
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/core/CachingHostAllocator.h
    """
    return float(2 ** max(0, int(size) - 1).bit_length()) if size else 0.0

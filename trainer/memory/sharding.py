"""What DeepSpeed, FSDP and the communication take beside the shards."""

from __future__ import annotations

from trainer.memory.layout import GIB, Term, term
from trainer.memory.states import Case

MAX_LIVE = 10**9
"""Parameters that ZeRO 3 may have gathered at once (`stage3_max_live_parameters`)."""
PREFETCH = 5 * 10**7
"""Parameters that it gathers ahead (`stage3_prefetch_bucket_size`)."""
REDUCE_BUCKET = 5 * 10**8
"""Gradients that it reduces at once (`reduce_bucket_size`). These three are DeepSpeed's defaults:
https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training"""
NCCL_GIB = 0.5
"""Own assumption: buffers of 4 MiB (`NCCL_BUFFSIZE`) for each channel, peer and protocol, some 100 of them on a node of
eight with NVLink; https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"""


def gathered(case: Case) -> Term:
    """Whole parameters on their way through a layer: the policy's, and the reference's two layers at a time."""
    if case.layout.engine == "fsdp2":
        return _gathered_by_layer(case)
    if case.layout.engine != "zero3":
        return term("gathered", 0, "parameters are not cut")
    architecture, each = case.architecture, case.precision.weights
    live = min(architecture.parameters, MAX_LIVE + PREFETCH)
    second = 0
    if case.layout.reference == "model":
        # TRL lets the reference gather 0.9 h^2 ahead; the head or two layers are more
        second = min(
            architecture.parameters, max(2 * architecture.layer_parameters, architecture.embedding_parameters)
        )
    why = f"up to {live / 1e9:,.2f} billion parameters, and {second / 1e9:,.2f} of the reference, x {each} bytes"
    return term("gathered", (live + second) * each, why)


def _gathered_by_layer(case: Case) -> Term:
    """FSDP 2: a layer, the buffer that it came in, and that of the next one, which is on its way; and the head, which
    Accelerate has stay from the end of the forward pass on
    (https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, `unshard`).
    """
    architecture, each = case.architecture, case.precision.computed
    models = 2 if case.layout.reference == "model" else 1
    live = models * (3 * architecture.layer_parameters + architecture.embedding_parameters)
    why = f"three times a layer, and the head, {live / 1e9:,.2f} billion parameters x {each} bytes"
    return term("gathered", live * each, why)


def buckets(case: Case) -> Term:
    """Gradients on their way to the GPU that keeps them: a bucket, and the reduced copy of it."""
    if case.layout.engine == "fsdp2":
        return _reduced_by_layer(case)
    if not case.layout.is_zero:
        return term("buckets", 0, "no ZeRO")
    size = REDUCE_BUCKET * case.precision.computed
    largest = max(case.architecture.embedding_parameters, 0) if case.lora is None else 0
    sent = min(REDUCE_BUCKET, max(case.trained, 1)) * case.precision.computed
    beyond = max(0, largest - REDUCE_BUCKET) * case.precision.computed
    why = f"a bucket of {REDUCE_BUCKET / 1e9:.1f} billion x {case.precision.computed} bytes, and what is sent of it"
    return term("buckets", size + sent + beyond, why)


def _reduced_by_layer(case: Case) -> Term:
    """FSDP 2: a layer's gradients as they are sent, and the layer's before it, which may still be sent
    (`_fsdp_collectives.py` beside it, `foreach_reduce`).
    """
    architecture, each = case.architecture, case.precision.computed
    largest = max(architecture.layer_parameters, architecture.embedding_parameters)
    if case.lora:
        largest = case.lora.parameters // architecture.num_hidden_layers
    why = f"the gradients of two layers, {largest / 1e9:,.3f} billion parameters each, x {each} bytes"
    return term("buckets", 2 * largest * each, why)


def nccl(case: Case) -> Term:
    """Buffers of NCCL, outside torch's allocator."""
    return term(
        "nccl", NCCL_GIB * GIB if case.layout.processes > 1 else 0, "own assumption; see NCCL_BUFFSIZE"
    )

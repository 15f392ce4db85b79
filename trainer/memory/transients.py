"""What comes and goes within a step: the head, a layer's backward pass, the reference's pass, the optimizer's step.

They follow one another, so the largest of them counts, on top of what is kept. Which tensors live at once was read
off the sources that each function names, and held against torch's memory tracker in `bench/memory.py`.
"""

from __future__ import annotations

from trainer.memory.activations import SCORE_BYTES, TokenBatch, cast_weights, layer_bytes
from trainer.memory.layout import GIB, Term, term
from trainer.memory.resident import Case, reference_bytes

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""TRL's head multiplies so many tokens by so many words at a time, and keeps no logits:
https://github.com/huggingface/trl/blob/main/trl/kernels/chunked_logprob.py"""
STATISTICS_BYTES = 40
"""Of a token in that head: seven running float32 sums, and its target as int64, with room for what is made of them."""
SUB_GROUP = 10**9
"""Weights that ZeRO 3 steps at a time (`sub_group_size`, https://www.deepspeed.ai/docs/config-json/)."""


def saved_head_bytes(case: Case, tokens: TokenBatch) -> float:
    """What TRL's head keeps for its backward pass: its input, and three numbers for each token."""
    return tokens.total * (case.architecture.hidden_size * case.precision.stream + 16)


def head(case: Case, tokens: TokenBatch) -> Term:
    """The backward pass of TRL's head: gradients summed in float32, then cast, beside a tile of logits."""
    precision, hidden_size = case.precision, case.architecture.hidden_size
    hidden = tokens.total * (hidden_size * _summed(precision.stream) + STATISTICS_BYTES)
    weight = 0 if case.lora else case.architecture.embedding_parameters * _summed(precision.arriving)
    tile = _tile(case, tokens) + _whole_logits(case, tokens)
    why = f"the head's backward pass: a tile of {tile / 2**20:,.0f} MiB, float32 gradients of {tokens.total:,} tokens"
    return term("work space", tile + hidden + weight, why + " and of the head's weights")


def end_of_forward(case: Case, tokens: TokenBatch) -> Term:
    """The head's forward pass, when autocast still has its copies of all weights; activations have them counted where
    nothing is checkpointed.
    """
    casts = cast_weights(case) if case.layout.activation_checkpointing and not case.lora else 0.0
    return term(
        "work space", casts + _tile(case, tokens), "the forward pass' end: weights as autocast made them"
    )


def layer(case: Case, tokens: TokenBatch, *, padded: bool = True) -> Term:
    """The backward pass of one layer; with checkpointing the layer is computed again, and all of it is there.

    What is saved goes as gradients come: beside it is a gradient of the feed-forward layer's width, or, of eager
    attention, the scores' gradients in float32, twice.
    """
    architecture, precision = case.architecture, case.precision
    again = layer_bytes(case, tokens, padded=padded) if case.layout.activation_checkpointing else 0.0
    inner = architecture.intermediate_size * precision.computed
    flowing = inner
    if case.layout.attention == "eager":
        flowing = max(inner, 6 * architecture.num_attention_heads * tokens.length - 4 * inner)
    flowing += 2 * architecture.hidden_size * precision.stream
    size = again + tokens.total * flowing + _layer_gradients(case) + _layer_weights(case)
    why = "a layer's backward pass" + (": the layer computed again, and its gradients" if again else "")
    return term("work space", size, why)


def reference_pass(case: Case, tokens: TokenBatch) -> Term:
    """The reference's forward pass, while the policy's activations wait: nothing is kept but what a layer is at."""
    architecture, e = case.architecture, case.precision.computed
    per_token = 3.0 * e * architecture.intermediate_size + 4 * 4 * architecture.hidden_size
    if case.layout.attention == "eager":
        per_token += 2 * SCORE_BYTES * architecture.num_attention_heads * tokens.length
    casts = 0.0
    if case.layout.reference == "model" and case.precision.autocast and reference_bytes(case) > e:
        casts = architecture.parameters * e
    needed = case.layout.reference in ("model", "adapters_off")
    size = _tile(case, tokens) + tokens.total * per_token + casts if needed else 0.0
    return term("work space", size, "the reference's forward pass")


def step(case: Case) -> Term:
    """The optimizer's step, when activations are gone: float32 gradients under ZeRO, and what the optimizer needs.

    https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/zero/stage3.py (`_prepare_sub_group`)
    """
    if case.layout.offload_optimizer:
        return term("work space", 0, "the optimizer steps on the host")
    stepped = case.trained / case.layout.state_shards
    if case.layout.engine == "zero3":
        stepped = min(stepped, SUB_GROUP)
    casts = 4 if case.precision.masters else 0
    each = casts + case.optimizer.in_passing * case.stepped_bytes
    return term(
        "work space", stepped * each, f"the optimizer's step: {stepped / 1e9:,.3f} billion x {each} bytes"
    )


def _tile(case: Case, tokens: TokenBatch) -> int:
    """A tile of logits, and what is multiplied for it if it has to be cast."""
    architecture, e = case.architecture, case.precision.computed
    rows, words = min(tokens.total, TILE_TOKENS), min(architecture.vocab_size, TILE_VOCABULARY)
    cast = (rows + words) * architecture.hidden_size * e if case.precision.casts else 0
    return rows * TILE_VOCABULARY * e + cast


def _whole_logits(case: Case, tokens: TokenBatch) -> float:
    """Label smoothing wants them all: as they are, in float32, and their gradient
    (https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py, `compute_loss`).
    """
    method, settings = case.recipe.training_method, case.recipe.trainer_args
    if not (method.smooths_labels and settings.get("label_smoothing_factor")):
        return 0.0
    return tokens.total * case.architecture.vocab_size * (case.precision.computed + 8.0)


def _summed(size: int) -> int:
    """Of a gradient: its float32 sum, and the copy in another dtype."""
    return 4 + (size if size != 4 else 0)


def _layer_gradients(case: Case) -> float:
    """Of one layer's weights, before they are added to what is kept, or reduced."""
    if case.lora is not None:
        return 0.0
    linears = case.architecture.linears.values()
    if case.layout.is_sharded:
        return sum(each.weights for each in linears) * float(case.precision.arriving)
    return max(each.weights for each in linears) * float(case.precision.gradients)


def _layer_weights(case: Case) -> float:
    """Weights in the dtype that they are multiplied in: cast, or out of their 4 bits, for the products at hand."""
    linears = case.architecture.linears.values()
    e = float(case.precision.computed)
    if case.recipe.is_quantised:
        return 2 * max(each.weights for each in linears) * e
    if not case.precision.casts:
        return 0.0
    return sum(each.weights for each in linears) * e if case.layout.activation_checkpointing else 0.0


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

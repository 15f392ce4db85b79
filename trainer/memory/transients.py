"""The memory that a GPU needs only at moments of a step: the head, a layer's backward pass, the reference's pass, the
optimizer's step, gathered parameters and communication buffers.

The moments follow one another, so only the largest counts, on top of the resident memory. The list of tensors that are
alive at once comes from the sources that each function names. `bench/memory.py` compares it with torch's memory tracker.
"""

from __future__ import annotations

from trainer.memory.activations import SCORE_BYTES, TokenBatch, cast_weights, layer_bytes
from trainer.memory.layout import GIB, Term, make_term
from trainer.memory.resident import Case, reference_bytes

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""TRL's head multiplies at most this many tokens by this many vocabulary entries at a time, and saves no logits:
https://github.com/huggingface/trl/blob/main/trl/kernels/chunked_logprob.py"""
STATISTICS_BYTES = 40
"""Bytes per token in that head: seven running float32 sums and the target as int64, with room for temporaries."""
SUB_GROUP = 10**9
"""Weights that ZeRO-3 steps at a time (`sub_group_size`, https://www.deepspeed.ai/docs/config-json/)."""
MAX_LIVE = 10**9
"""Parameters that ZeRO-3 may have gathered at once (`stage3_max_live_parameters`)."""
PREFETCH = 5 * 10**7
"""Parameters that ZeRO-3 gathers ahead (`stage3_prefetch_bucket_size`)."""
REDUCE_BUCKET = 5 * 10**8
"""Gradients that DeepSpeed reduces at once (`reduce_bucket_size`). These three are DeepSpeed's defaults:
https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training"""
NCCL_GIB = 0.5
"""Own assumption: a 4 MiB buffer (`NCCL_BUFFSIZE`) per channel, peer and protocol, some 100 of them on a node of eight
with NVLink; https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"""


def saved_head_bytes(case: Case, tokens: TokenBatch) -> float:
    """Return the bytes that TRL's head saves for its backward pass: its input, and 16 bytes of numbers per token."""
    return tokens.total * (case.architecture.hidden_size * case.precision.stream + 16)


def predict_head(case: Case, tokens: TokenBatch) -> Term:
    """Return the term of the head's backward pass: a tile of logits, and gradients summed in float32 and then cast."""
    precision, hidden_size = case.precision, case.architecture.hidden_size
    hidden = tokens.total * (hidden_size * _gradient_bytes(precision.stream) + STATISTICS_BYTES)
    weight = 0 if case.lora else case.architecture.embedding_parameters * _gradient_bytes(precision.arriving)
    tile = _tile_bytes(case, tokens) + _whole_logits_bytes(case, tokens)
    why = f"the head's backward pass: a tile of {tile / 2**20:,.0f} MiB, float32 gradients of {tokens.total:,} tokens"
    return make_term("work space", tile + hidden + weight, why + " and of the head's weights")


def predict_forward_end(case: Case, tokens: TokenBatch) -> Term:
    """Return the term of the head's forward pass, while autocast still has its copies of all weights.

    Without checkpointing the activations already count these copies.
    """
    casts = cast_weights(case) if case.layout.activation_checkpointing and not case.lora else 0.0
    why = "the end of the forward pass: autocast's copies of the weights, and a tile of logits"
    return make_term("work space", casts + _tile_bytes(case, tokens), why)


def predict_layer(case: Case, tokens: TokenBatch, *, padded: bool = True) -> Term:
    """Return the term of one layer's backward pass. With checkpointing it includes the recomputed layer.

    Saved tensors are freed while gradients are made. Beside them there is one gradient of the feed-forward layer's
    width. For eager attention it is the scores' gradient in float32, twice, if that is larger.
    """
    architecture, precision = case.architecture, case.precision
    recomputed = layer_bytes(case, tokens, padded=padded) if case.layout.activation_checkpointing else 0.0
    inner = architecture.intermediate_size * precision.computed
    flowing = inner
    if case.layout.attention == "eager":
        flowing = max(inner, 6 * architecture.num_attention_heads * tokens.length - 4 * inner)
    flowing += 2 * architecture.hidden_size * precision.stream
    size = recomputed + tokens.total * flowing + _layer_gradient_bytes(case) + _layer_weight_bytes(case)
    why = "a layer's backward pass" + (": the recomputed layer, and its gradients" if recomputed else "")
    return make_term("work space", size, why)


def predict_reference_pass(case: Case, tokens: TokenBatch) -> Term:
    """Return the term of the reference's forward pass, during which the policy's activations stay in memory.

    The pass saves nothing, so it holds only the tensors of one layer.
    """
    architecture, e = case.architecture, case.precision.computed
    per_token = 3.0 * e * architecture.intermediate_size + 4 * 4 * architecture.hidden_size
    if case.layout.attention == "eager":
        per_token += 2 * SCORE_BYTES * architecture.num_attention_heads * tokens.length
    casts = 0.0
    if case.layout.reference == "model" and case.precision.autocast and reference_bytes(case) > e:
        casts = architecture.parameters * e
    needed = case.layout.reference in ("model", "adapters_off")
    size = _tile_bytes(case, tokens) + tokens.total * per_token + casts if needed else 0.0
    return make_term("work space", size, "the reference's forward pass")


def predict_step(case: Case) -> Term:
    """Return the term of the optimizer's step: ZeRO's float32 gradients, and the optimizer's extra values.

    The activations are freed by then.
    https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/zero/stage3.py (`_prepare_sub_group`)
    """
    if case.layout.offload_optimizer:
        return make_term("work space", 0, "the optimizer steps on the host")
    stepped = case.trained / case.layout.state_shards
    if case.layout.engine == "zero3":
        stepped = min(stepped, SUB_GROUP)
    casts = 4 if case.precision.masters else 0
    each = casts + case.optimizer.transient_states * case.stepped_bytes
    why = f"the optimizer's step: {stepped / 1e9:,.3f} billion x {each} bytes"
    return make_term("work space", stepped * each, why)


def predict_gathered(case: Case) -> Term:
    """Return the term of gathered parameters: the policy's, and two layers of the reference."""
    if case.layout.engine == "fsdp2":
        return _predict_fsdp_gathered(case)
    if case.layout.engine != "zero3":
        return make_term("gathered", 0, "parameters are not sharded")
    architecture, each = case.architecture, case.precision.weights
    live = min(architecture.parameters, MAX_LIVE + PREFETCH)
    second = 0
    if case.layout.reference == "model":
        # TRL lets the reference gather 0.9 h^2 parameters ahead. The head or two layers are more than that.
        second = min(
            architecture.parameters, max(2 * architecture.layer_parameters, architecture.embedding_parameters)
        )
    why = f"up to {live / 1e9:,.2f} billion parameters, and {second / 1e9:,.2f} of the reference, x {each} bytes"
    return make_term("gathered", (live + second) * each, why)


def predict_buckets(case: Case) -> Term:
    """Return the term of gradients in communication: ZeRO's bucket, and its reduced copy."""
    if case.layout.engine == "fsdp2":
        return _predict_fsdp_buckets(case)
    if not case.layout.is_zero:
        return make_term("buckets", 0, "no ZeRO")
    size = REDUCE_BUCKET * case.precision.computed
    largest = max(case.architecture.embedding_parameters, 0) if case.lora is None else 0
    sent = min(REDUCE_BUCKET, max(case.trained, 1)) * case.precision.computed
    # a single gradient that is larger than the bucket is reduced by itself
    beyond = max(0, largest - REDUCE_BUCKET) * case.precision.computed
    why = f"a bucket of {REDUCE_BUCKET / 1e9:.1f} billion x {case.precision.computed} bytes, and its reduced copy"
    return make_term("buckets", size + sent + beyond, why)


def predict_nccl(case: Case) -> Term:
    """Return the term of NCCL's buffers, which are outside torch's allocator."""
    size = NCCL_GIB * GIB if case.layout.processes > 1 else 0
    return make_term("nccl", size, "own assumption; see NCCL_BUFFSIZE")


def _tile_bytes(case: Case, tokens: TokenBatch) -> int:
    """Return the bytes of a tile of logits, with the cast copies of its factors if they have to be cast."""
    architecture, e = case.architecture, case.precision.computed
    rows, words = min(tokens.total, TILE_TOKENS), min(architecture.vocab_size, TILE_VOCABULARY)
    cast = (rows + words) * architecture.hidden_size * e if case.precision.casts else 0
    return rows * TILE_VOCABULARY * e + cast


def _whole_logits_bytes(case: Case, tokens: TokenBatch) -> float:
    """Return the bytes of all logits, which label smoothing needs: as computed, in float32, and their gradient
    (https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py, `compute_loss`).
    """
    method, settings = case.recipe.training_method, case.recipe.trainer_args
    if not (method.smooths_labels and settings.get("label_smoothing_factor")):
        return 0.0
    return tokens.total * case.architecture.vocab_size * (case.precision.computed + 8.0)


def _gradient_bytes(size: int) -> int:
    """Return the bytes per element of a gradient: its float32 sum, and its copy if the dtype is another one."""
    return 4 + (size if size != 4 else 0)


def _layer_gradient_bytes(case: Case) -> float:
    """Return the bytes of a layer's new weight gradients, before they are accumulated or reduced."""
    if case.lora is not None:
        return 0.0
    linears = case.architecture.linears.values()
    if case.layout.is_sharded:
        return sum(linear.weights for linear in linears) * float(case.precision.arriving)
    return max(linear.weights for linear in linears) * float(case.precision.gradients)


def _layer_weight_bytes(case: Case) -> float:
    """Return the bytes of weights that were cast or dequantised for the current matrix products."""
    linears = case.architecture.linears.values()
    e = float(case.precision.computed)
    if case.recipe.is_quantised:
        return 2 * max(linear.weights for linear in linears) * e
    if not case.precision.casts:
        return 0.0
    return sum(linear.weights for linear in linears) * e if case.layout.activation_checkpointing else 0.0


def _predict_fsdp_gathered(case: Case) -> Term:
    """Return the term of FSDP2's gathered parameters: a layer, its buffer, the next layer's buffer, and the head.

    Accelerate keeps the head gathered from the end of the forward pass on
    (https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, `unshard`).
    """
    architecture, each = case.architecture, case.precision.computed
    models = 2 if case.layout.reference == "model" else 1
    live = models * (3 * architecture.layer_parameters + architecture.embedding_parameters)
    why = f"three times a layer, and the head, {live / 1e9:,.2f} billion parameters x {each} bytes"
    return make_term("gathered", live * each, why)


def _predict_fsdp_buckets(case: Case) -> Term:
    """Return the term of FSDP2's gradients in communication: those of one layer, and of the layer before it, which may
    not be sent yet (`_fsdp_collectives.py` in the same folder, `foreach_reduce`).
    """
    architecture, each = case.architecture, case.precision.computed
    largest = max(architecture.layer_parameters, architecture.embedding_parameters)
    if case.lora:
        largest = case.lora.parameters // architecture.num_hidden_layers
    why = f"the gradients of two layers, {largest / 1e9:,.3f} billion parameters each, x {each} bytes"
    return make_term("buckets", 2 * largest * each, why)

"""The tensors that autograd saves in the forward pass for the backward pass, operation by operation.

Korthikanti et al. (arXiv:2205.05198, section 4.1) count s b h (34 + 5 a s / h) bytes per layer for GPT's layer: biases,
LayerNorm, GELU, dropout, and as many key heads as query heads. This module counts Llama's layer, as Transformers
writes it in eager torch: RMSNorm in float32, rotary positions, grouped keys and values, and a gated feed-forward
layer. A test compares every line below with `torch.autograd.graph.saved_tensors_hooks`.

A function without a unit in its docstring returns bytes per token.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from trainer.memory.layout import Term, make_term
from trainer.memory.lora import Lora
from trainer.memory.resident import Case

ROOT_BYTES = 4
"""Bytes of the reciprocal root that RMSNorm saves for each vector."""
SCORE_BYTES = 4
"""Bytes per attention score: eager attention computes its softmax in float32 and saves it."""


class TokenBatch(NamedTuple):
    """The tokens that pass through the model at once: `sequences` of `length` tokens."""

    sequences: int
    length: int

    @property
    def total(self) -> int:
        return self.sequences * self.length


def predict_activations(case: Case, tokens: TokenBatch, *, padded: bool = True) -> Term:
    """Return the term of all tensors saved at the end of the forward pass, except those of the head.

    Args:
        case: the recipe on its layout.
        tokens: the batch.
        padded: whether the batch has padding, and therefore an attention mask.
    """
    layers, precision = case.architecture.num_hidden_layers, case.precision
    rest = shared_bytes(case, tokens)
    if case.layout.activation_checkpointing:
        each = layer_input_bytes(case, tokens)
        numbers = f"{tokens.total:,} tokens x {case.architecture.hidden_size} x {precision.stream} bytes"
        return make_term("activations", layers * each + rest, f"{layers} layers' inputs, {numbers}")
    each = layer_bytes(case, tokens, padded=padded)
    rest += _rotary_bytes(case, tokens) + cast_weights(case) - _unsaved_first_layer(case) * tokens.total
    why = f"{layers} layers x {each / tokens.total:,.0f} bytes x {tokens.total:,} tokens, {case.layout.attention}"
    return make_term("activations", layers * each + rest, why)


def cast_weights(case: Case) -> float:
    """Return the bytes of autocast's copies of the weights.

    Autocast keeps the copies until the end of the forward pass. The matrix products keep them until their backward
    pass (https://docs.pytorch.org/docs/stable/amp.html).
    """
    return case.architecture.linear_weights * float(case.precision.computed) if case.precision.casts else 0.0


def layer_input_bytes(case: Case, tokens: TokenBatch) -> float:
    """Return the bytes of a layer's input, the only tensor that checkpointing keeps (arXiv:1604.06174)."""
    return tokens.total * case.architecture.hidden_size * case.precision.stream


def shared_bytes(case: Case, tokens: TokenBatch) -> float:
    """Return the bytes saved outside the layers: token ids (8 bytes each), and the last norm."""
    return tokens.total * (8 + _norm(case, case.architecture.hidden_size))


def layer_bytes(case: Case, tokens: TokenBatch, *, padded: bool = True) -> float:
    """Return the bytes that one layer saves without checkpointing."""
    per_token = (
        _norms(case)
        + _attention_inputs(case)
        + _attention(case, tokens.length, padded=padded)
        + _feed_forward(case)
        + _adapters(case)
    )
    return tokens.total * per_token


def _rotary_bytes(case: Case, tokens: TokenBatch) -> float:
    """Return the bytes of the positions' sine and cosine, which all layers share."""
    return 2.0 * tokens.length * case.architecture.head_dim * case.precision.stream


def _unsaved_first_layer(case: Case) -> float:
    """Return what the first layer does not save under LoRA: nothing before its first adapter has a gradient."""
    if case.lora is None:
        return 0.0
    masks = [_mask(case, name) for name in case.lora.targets if name in ("q_proj", "k_proj", "v_proj")]
    return _norm(case, case.architecture.hidden_size) + sum(masks)


def _trains_weights(case: Case) -> bool:
    """Whether the model's own weights are trained, not an adapter."""
    return case.lora is None


def _norm(case: Case, width: int, *, vectors: int = 1, each: int | None = None) -> float:
    """Count one RMSNorm over `width` values: its input in float32, its root, and the tensor that its weight multiplies.

    Gemma multiplies in float32, by a weight that it adds 1 to. Other models multiply in the precision of the input,
    which has `each` bytes per element, by default those of the hidden states.
    """
    scaled = 4 if case.architecture.family.upcast_norms else each or case.precision.stream
    return 4 * width + ROOT_BYTES * vectors + (scaled * width if _trains_weights(case) else 0)


def _norms(case: Case) -> float:
    """Count all norms of a layer, with those of queries and keys where the model has them."""
    architecture = case.architecture
    layer = architecture.family.norms_per_layer * _norm(case, architecture.hidden_size)
    if not architecture.family.qk_norm:
        return layer
    heads = architecture.num_attention_heads + architecture.num_key_value_heads
    return layer + _norm(case, heads * architecture.head_dim, vectors=heads, each=case.precision.computed)


def _attention_inputs(case: Case) -> float:
    """Count the input of the query, key and value projections, saved for the gradients of their weights."""
    return _inputs(case, case.architecture.hidden_size, 3)


def _inputs(case: Case, width: int, linears: int) -> float:
    """Count an input that `linears` projections share. Autocast makes one copy per projection."""
    if not _trains_weights(case):
        return 0.0
    return case.precision.computed * width * (linears if case.precision.casts else 1)


def _attention(case: Case, length: int, *, padded: bool) -> float:
    """Count queries, keys, values, the result, and the extra tensors of the attention implementation.

    FlashAttention saves a float32 sum per row of scores (arXiv:2205.14135, section 3.1), and so do torch's fused
    kernels. With a mask these also save as many keys as queries, and the mask as numbers. Eager attention saves the
    scores, which is 5 a s in Korthikanti's formula. FlashAttention 2 saves only the grouped keys, but the worker uses
    torch's kernels where the package is missing, so FlashAttention 2 counts like them.
    """
    architecture, e = case.architecture, case.precision.computed
    queries, keys = architecture.query_size, architecture.key_value_size
    heads = architecture.num_attention_heads
    if case.layout.attention == "eager":
        scores = SCORE_BYTES + (e if e < SCORE_BYTES else 0)
        return 4 * e * queries + scores * heads * length
    mask = e * length if padded else 0
    return e * (2 * queries + 2 * (queries if padded else keys)) + SCORE_BYTES * heads + mask


def _feed_forward(case: Case) -> float:
    """Count the input, the gate before and after its activation, the other half, and the product of both."""
    architecture, e = case.architecture, case.precision.computed
    product = e * architecture.intermediate_size if _trains_weights(case) else 0
    gated = 3 * e * architecture.intermediate_size
    return _inputs(case, architecture.hidden_size, 2) + gated + product


def _adapters(case: Case) -> float:
    """Count LoRA: the input of each first matrix, its dropout mask, and the input of each second matrix."""
    if case.lora is None:
        return 0.0
    lora, precision = case.lora, case.precision
    between = (precision.computed if precision.autocast else precision.adapter) * lora.rank
    return sum(_adapter_input(case, lora, name) + between for name in lora.targets)


def _adapter_input(case: Case, lora: Lora, name: str) -> float:
    """Count the input of one first matrix.

    An input that is cast or dropped out is a copy per matrix. Otherwise it is the projection's own input, which is
    saved once.
    """
    precision = case.precision
    width = case.architecture.linears[name].inputs
    uncopied = precision.adapter == precision.computed == precision.stream and not lora.dropout
    if uncopied and (name == "o_proj" or _is_saved_earlier(name, lora.targets)):
        return 0.0
    element = precision.computed if precision.autocast else precision.adapter
    return element * width + _mask(case, name)


def _mask(case: Case, name: str) -> float:
    """Count a dropout mask before a projection: one byte per input on a GPU, one number per input on the CPU."""
    if case.lora is None or not case.lora.dropout:
        return 0.0
    return float(case.architecture.linears[name].inputs * (case.precision.trained if case.on_cpu else 1))


def _is_saved_earlier(name: str, targets: Container[str]) -> bool:
    """Whether an earlier adapted projection saves the same input."""
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    group = next((group for group in groups if name in group), (name,))
    return any(earlier in targets for earlier in group[: group.index(name)])

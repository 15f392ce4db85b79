"""What the forward pass leaves for the backward pass: tensors that autograd saves, operation by operation.

The count of Korthikanti et al. (arXiv:2205.05198, section 4.1: s b h (34 + 5 a s / h) bytes a layer) is of GPT's
layer: biases, LayerNorm, GELU, dropout, as many heads of keys as of queries. This one is of Llama's, as
Transformers writes it in eager torch: RMSNorm computed in float32, rotary positions, grouped keys and values, a
gated feed-forward layer. Every line below is held against `torch.autograd.graph.saved_tensors_hooks` by a test.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from trainer.memory.layout import Term, term
from trainer.memory.lora import Lora
from trainer.memory.resident import Case

ROOT_BYTES = 4
"""Of the reciprocal root that RMSNorm keeps for each vector."""
SCORE_BYTES = 4
"""Eager attention computes its softmax in float32, and keeps it."""


class TokenBatch(NamedTuple):
    """What passes through the model at once: `sequences`, each of `length` tokens."""

    sequences: int
    length: int

    @property
    def total(self) -> int:
        return self.sequences * self.length


def activations(case: Case, tokens: TokenBatch, *, padded: bool = True) -> Term:
    """All that is saved at the end of the forward pass, the head's part apart; `padded` batches need a mask."""
    layers, precision = case.architecture.num_hidden_layers, case.precision
    rest = shared_bytes(case, tokens)
    if case.layout.activation_checkpointing:
        each = checkpoint_bytes(case, tokens)
        numbers = f"{tokens.total:,} tokens x {case.architecture.hidden_size} x {precision.stream} bytes"
        return term("activations", layers * each + rest, f"{layers} layers' inputs, {numbers}")
    each = layer_bytes(case, tokens, padded=padded)
    rest += _rotary(case, tokens) + cast_weights(case) - _first_layer(case) * tokens.total
    why = f"{layers} layers x {each / tokens.total:,.0f} bytes x {tokens.total:,} tokens, {case.layout.attention}"
    return term("activations", layers * each + rest, why)


def cast_weights(case: Case) -> float:
    """Autocast's copies of the weights: it keeps them until the forward pass is over, and the products that they are
    in until their backward pass (https://docs.pytorch.org/docs/stable/amp.html).
    """
    return case.architecture.linear_weights * float(case.precision.computed) if case.precision.casts else 0.0


def checkpoint_bytes(case: Case, tokens: TokenBatch) -> float:
    """A layer's input: all that is kept of it with checkpointing (arXiv:1604.06174)."""
    return tokens.total * case.architecture.hidden_size * case.precision.stream


def shared_bytes(case: Case, tokens: TokenBatch) -> float:
    """Saved beside the layers: token ids, and by the last norm."""
    return tokens.total * (8 + _norm(case, case.architecture.hidden_size))


def _rotary(case: Case, tokens: TokenBatch) -> float:
    """Sine and cosine of the positions, which all layers share."""
    return 2.0 * tokens.length * case.architecture.head_dim * case.precision.stream


def _first_layer(case: Case) -> float:
    """What the first layer does not save: nothing before LoRA's first matrix has a gradient."""
    if case.lora is None:
        return 0.0
    masks = [_mask(case, name) for name in case.lora.targets if name in ("q_proj", "k_proj", "v_proj")]
    return _norm(case, case.architecture.hidden_size) + sum(masks)


def layer_bytes(case: Case, tokens: TokenBatch, *, padded: bool = True) -> float:
    """Saved by one layer without checkpointing."""
    per_token = (
        _norms(case)
        + _attention_inputs(case)
        + _attention(case, tokens.length, padded=padded)
        + _feed_forward(case)
        + _adapters(case)
    )
    return tokens.total * per_token


def _trained_whole(case: Case) -> bool:
    return case.lora is None


def _norm(case: Case, width: int, *, vectors: int = 1, each: int | None = None) -> float:
    """Of one RMSNorm over `width` numbers a token: its input in float32, its root, and what its weight multiplies.

    Gemma multiplies in float32, by a weight that it adds 1 to; others in the precision of the input, `each` bytes, or
    the hidden states'.
    """
    scaled = 4 if case.architecture.family.upcast_norms else each or case.precision.stream
    return 4 * width + ROOT_BYTES * vectors + (scaled * width if _trained_whole(case) else 0)


def _norms(case: Case) -> float:
    architecture = case.architecture
    layer = architecture.family.norms_per_layer * _norm(case, architecture.hidden_size)
    if not architecture.family.qk_norm:
        return layer
    heads = architecture.num_attention_heads + architecture.num_key_value_heads
    return layer + _norm(case, heads * architecture.head_dim, vectors=heads, each=case.precision.computed)


def _attention_inputs(case: Case) -> float:
    """Of the projections of queries, keys and values, for their weights' gradients."""
    return _inputs(case, case.architecture.hidden_size, 3)


def _inputs(case: Case, width: int, linears: int) -> float:
    """An input that `linears` projections share; autocast makes a copy for each of them."""
    if not _trained_whole(case):
        return 0.0
    return case.precision.computed * width * (linears if case.precision.casts else 1)


def _attention(case: Case, length: int, *, padded: bool) -> float:
    """Queries, keys, values and the result, and what the kind of attention keeps beside them.

    FlashAttention keeps a float32 sum for each row of scores (arXiv:2205.14135, section 3.1); so do torch's fused
    kernels, which with a mask want as many keys as queries, and the mask itself as numbers. Eager attention keeps
    the scores: 5 a s of Korthikanti's formula. FlashAttention 2 keeps no more keys than there are, but where its package
    is missing the worker takes torch's kernels, so it is counted as they are.
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
    """The input; the gate before and after its activation; the other half; their product."""
    architecture, e = case.architecture, case.precision.computed
    product = e * architecture.intermediate_size if _trained_whole(case) else 0
    gated = 3 * e * architecture.intermediate_size
    return _inputs(case, architecture.hidden_size, 2) + gated + product


def _adapters(case: Case) -> float:
    """Of LoRA: the input of each first matrix, a mask where it has dropout, and the input of the second."""
    if case.lora is None:
        return 0.0
    lora, precision = case.lora, case.precision
    between = (precision.computed if precision.autocast else precision.adapter) * lora.rank
    return sum(_adapter_input(case, lora, name) + between for name in lora.targets)


def _adapter_input(case: Case, lora: Lora, name: str) -> float:
    """A copy for each matrix if it is cast to the matrix' dtype or dropped out; else what is kept anyhow, once."""
    precision = case.precision
    width = case.architecture.linears[name].inputs
    in_hand = precision.adapter == precision.computed == precision.stream and not lora.dropout
    if in_hand and (name == "o_proj" or _shares(name, lora.targets)):
        return 0.0
    kept = precision.computed if precision.autocast else precision.adapter
    return kept * width + _mask(case, name)


def _mask(case: Case, name: str) -> float:
    """Of the dropout before a matrix: a byte for each input on a GPU, and on the CPU a number."""
    if case.lora is None or not case.lora.dropout:
        return 0.0
    return float(case.architecture.linears[name].inputs * (case.precision.trained if case.on_cpu else 1))


def _shares(name: str, targets: Container[str]) -> bool:
    """Whether an earlier projection of the same input keeps it already."""
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    group = next((group for group in groups if name in group), (name,))
    return any(earlier in targets for earlier in group[: group.index(name)])

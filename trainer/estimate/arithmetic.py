"""Seconds of a GPU for one pass over a micro batch: products, attention, and what moves through memory between them.

A forward pass costs 2 FLOPs for each weight and token, a backward pass 4: 2 for the gradient of the input and 2 for
that of the weight (Kaplan et al., arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B). Attention adds
4 x tokens x heads x head size for each token and layer, half of that under a causal mask that is skipped
(PaLM, appendix B; Megatron-LM, arXiv:2104.04473, section 5.1). Recomputation is one more forward pass
(arXiv:2205.05198, section 5). Frozen weights have no gradient: LoRA saves 2 of the 4.
"""

from __future__ import annotations

from typing import NamedTuple

from trainer.architecture import Architecture
from trainer.estimate import efficiency
from trainer.estimate.batch import MicroBatch
from trainer.estimate.efficiency import Stack
from trainer.estimate.machine import Machine
from trainer.memory import Layout, lora
from trainer.recipe import Recipe

HALF = 2
"""Bytes of a bf16 value."""
NF4_BYTES = 0.5
BACKWARD_ATTENTION = 2.5
"""Of the forward pass: five products for two (arXiv:2307.08691, section 3.1)."""


class StepInputs(NamedTuple):
    """What is estimated: the arguments that every term needs."""

    recipe: Recipe
    architecture: Architecture
    layout: Layout
    machine: Machine
    stack: Stack


class Pass(NamedTuple):
    """Seconds of one forward pass, or of what a backward pass has in common with it."""

    matmul: float
    attention: float
    memory: float
    """Elementwise kernels."""
    launches: float
    """The time that starting all the kernels takes at least."""
    dequantise: float
    overhead: float
    """Times what a GPU does, where published runs take more than can be counted."""

    def seconds(self, *, matmuls: float = 1.0, attentions: float = 1.0, memories: float = 1.0) -> float:
        """Of this many of each; never less than the launches of as many passes."""
        busy = matmuls * self.matmul + attentions * self.attention + memories * self.memory
        return self.overhead * max(busy, memories * self.launches) + self.dequantise


def one_pass(run: StepInputs, batch: MicroBatch, *, adapted: bool = True) -> Pass:
    """A forward pass of a micro batch; the adapters' share is in it, where there are any and unless told."""
    architecture, machine = run.architecture, run.machine
    targets = lora.list_targets(run.recipe, architecture) if adapted else ()
    weights = architecture.linear_weights + architecture.embedding_parameters
    added = lora.count_adapter_parameters(run.recipe, architecture) if adapted else 0
    layers = architecture.num_hidden_layers
    kernels = efficiency.KERNELS_PER_LAYER + efficiency.KERNELS_PER_ADAPTER * len(targets)
    moved = elementwise_bytes(architecture, targets, run.stack)
    return Pass(
        matmul=2 * (weights + added) * batch.tokens / machine.flops + HALF * weights / machine.memory,
        attention=attention(architecture, run.layout, batch, machine),
        memory=moved * batch.tokens * layers / machine.memory,
        launches=kernels * layers * machine.launch_s,
        dequantise=_dequantise(run.recipe, architecture, machine),
        overhead=run.recipe.training_method.time_overhead,
    )


def attention(architecture: Architecture, layout: Layout, batch: MicroBatch, machine: Machine) -> float:
    """Of all layers; `eager` computes the whole square and carries its scores through memory."""
    square = batch.sequences * batch.square * architecture.num_hidden_layers
    flops = 4.0 * square * architecture.query_size
    if layout.attention != "eager":
        return flops / 2 / (machine.flops * efficiency.FLASH_EFFICIENCY)
    scores = square * architecture.num_attention_heads * efficiency.EAGER_ATTENTION_BYTES
    return flops / machine.flops + scores / machine.memory


def elementwise_bytes(architecture: Architecture, targets: tuple[str, ...], stack: Stack) -> float:
    """Of one token and layer, through GPU memory, outside the products."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    norms = architecture.family.norms_per_layer * stack.norm_bytes * hidden
    rotary = stack.rotary_bytes * (architecture.query_size + architecture.key_value_size)
    around = norms + rotary + stack.residual_bytes * hidden + stack.gate_bytes * inner
    adapted = [architecture.linears[name] for name in targets]
    added = sum(
        stack.adapter_input_bytes * linear.inputs + stack.adapter_output_bytes * linear.outputs
        for linear in adapted
    )
    return stack.upcast * (around + added)


def _dequantise(recipe: Recipe, architecture: Architecture, machine: Machine) -> float:
    """NF4 weights are read and written as bf16 before each product (QLoRA, arXiv:2305.14314, section 3)."""
    if recipe.quantised_bits != 4:
        return 0.0
    return (NF4_BYTES + HALF) * architecture.linear_weights / machine.memory

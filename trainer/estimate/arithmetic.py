"""The seconds of a GPU for one pass over a micro batch: matrix products, attention, and elementwise kernels.

A forward pass costs 2 FLOPs per weight and token. A backward pass costs 4: 2 for the gradient of the input and 2 for
the gradient of the weight (Kaplan et al., arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B). Attention
adds 4 x tokens x heads x head size FLOPs per token and layer, and half of that if the kernel skips the masked half
(PaLM, appendix B; Megatron-LM, arXiv:2104.04473, section 5.1). Recomputation is one more forward pass
(arXiv:2205.05198, section 5). Frozen weights have no gradient, so LoRA saves 2 of the 4 FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

from trainer.architecture import Architecture
from trainer.estimate import efficiency
from trainer.estimate.batch import MicroBatch
from trainer.estimate.efficiency import Machine, Stack
from trainer.memory import Layout, lora
from trainer.recipe import Recipe

HALF = 2
"""Bytes of a bf16 value."""
NF4_BYTES = 0.5
"""Bytes of a 4-bit weight."""
BACKWARD_ATTENTION = 2.5
"""Cost of attention's backward pass over its forward pass: five products instead of two (arXiv:2307.08691, section
3.1)."""


class StepInputs(NamedTuple):
    """The inputs of an estimate, which every term needs."""

    recipe: Recipe
    architecture: Architecture
    layout: Layout
    machine: Machine
    stack: Stack


class Pass(NamedTuple):
    """The seconds of one forward pass, by kind of work. A backward pass is a multiple of each kind."""

    matmul: float
    attention: float
    memory: float
    """Elementwise kernels."""
    launches: float
    """Starting all kernels, which is a lower bound of the pass."""
    dequantise: float
    """Reading 4-bit weights and writing them as bf16."""
    overhead: float
    """A factor (no unit) on the GPU's work, for methods whose published runs take longer than the counted work."""

    def seconds(self, *, matmuls: float = 1.0, attentions: float = 1.0, memories: float = 1.0) -> float:
        """Return the seconds of this many of each kind of work, and never less than the kernel launches take."""
        busy = matmuls * self.matmul + attentions * self.attention + memories * self.memory
        return self.overhead * max(busy, memories * self.launches) + self.dequantise


def one_pass(run: StepInputs, batch: MicroBatch, *, adapted: bool = True) -> Pass:
    """Return the seconds of a forward pass of a micro batch; `adapted=False` leaves the adapters out."""
    architecture, machine = run.architecture, run.machine
    targets = lora.list_targets(run.recipe, architecture) if adapted else ()
    weights = architecture.linear_weights + architecture.embedding_parameters
    added = lora.count_adapter_parameters(run.recipe, architecture) if adapted else 0
    layers = architecture.num_hidden_layers
    kernels = efficiency.KERNELS_PER_LAYER + efficiency.KERNELS_PER_ADAPTER * len(targets)
    moved = elementwise_bytes(architecture, targets, run.stack)
    return Pass(
        matmul=2 * (weights + added) * batch.tokens / machine.flops + HALF * weights / machine.memory,
        attention=attention_s(architecture, run.layout, batch, machine),
        memory=moved * batch.tokens * layers / machine.memory,
        launches=kernels * layers * machine.launch_s,
        dequantise=_dequantise_s(run.recipe, architecture, machine),
        overhead=run.recipe.training_method.time_overhead,
    )


def attention_s(architecture: Architecture, layout: Layout, batch: MicroBatch, machine: Machine) -> float:
    """Return the seconds of attention in all layers.

    Eager attention computes the masked half too, and moves its scores through GPU memory.
    """
    square = batch.sequences * batch.square * architecture.num_hidden_layers
    flops = 4.0 * square * architecture.query_size
    if layout.attention != "eager":
        return flops / 2 / (machine.flops * efficiency.FLASH_EFFICIENCY)
    scores = square * architecture.num_attention_heads * efficiency.EAGER_ATTENTION_BYTES
    return flops / machine.flops + scores / machine.memory


def elementwise_bytes(architecture: Architecture, targets: tuple[str, ...], stack: Stack) -> float:
    """Return the bytes that elementwise kernels move through GPU memory per token and layer."""
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


def _dequantise_s(recipe: Recipe, architecture: Architecture, machine: Machine) -> float:
    """Return the seconds of dequantisation: 4-bit weights are read and written as bf16 before each product (QLoRA,
    arXiv:2305.14314, section 3).
    """
    if recipe.quantised_bits != 4:
        return 0.0
    return (NF4_BYTES + HALF) * architecture.linear_weights / machine.memory

"""Seconds of moving bytes: between GPUs, between GPU and host, and through the optimizer.

ZeRO 3, and FSDP 2 alike, gathers the parameters for the forward pass and again for the backward pass, and reduces and scatters the
gradients of every micro batch: 3 times the parameters, where data parallelism moves 2 (ZeRO, arXiv:1910.02054,
section 7). A gather or a scatter of B bytes over n takes each GPU B x (n - 1) / n
(https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md); between nodes as much passes through a node's network.
"""

from __future__ import annotations

from trainer.estimate import efficiency
from trainer.estimate.arithmetic import HALF, StepInputs
from trainer.memory import lora
from trainer.memory.resident import optimizer_of

FULL = 4
"""Bytes of an fp32 value."""


def has_reference_pass(run: StepInputs) -> bool:
    """Whether each micro batch passes through the reference too."""
    return run.layout.reference in ("model", "adapters_off")


def exposed(traffic_s: float, compute_s: float) -> float:
    """What is left of traffic after hiding as much behind arithmetic as can be hidden."""
    return traffic_s - min(efficiency.OVERLAP * traffic_s, compute_s)


def collective(run: StepInputs, size_bytes: float) -> float:
    """A gather or a reduce-scatter of this many bytes over all processes."""
    count = run.layout.processes
    moved = size_bytes * (count - 1) / count
    within = moved / run.machine.link
    return max(within, moved / run.machine.network) if run.layout.nodes > 1 else within


def gathers(run: StepInputs) -> int:
    """Of the parameters, for each micro batch."""
    return 2 + has_reference_pass(run)


def between_gpus(run: StepInputs, accumulation: int) -> float:
    """Of one optimizer step, if nothing hid it."""
    if run.layout.processes == 1:
        return 0.0
    gradients = lora.count_trained_parameters(run.recipe, run.architecture)
    parameters = HALF * run.architecture.parameters
    match run.layout.engine:
        case "zero3" | "fsdp2":
            micro = gathers(run) * collective(run, parameters) + collective(run, HALF * gradients)
            return accumulation * micro
        case "zero2":
            return accumulation * collective(run, HALF * gradients) + collective(run, HALF * gradients)
        case _:
            return 2 * collective(run, FULL * gradients)


def parameters_from_host(run: StepInputs, accumulation: int) -> float:
    """Offloaded parameters on their way to the GPU: each process brings its shard for every gather."""
    if not run.layout.offload_parameters:
        return 0.0
    shard = HALF * run.architecture.parameters / run.layout.parameter_shards
    return accumulation * gathers(run) * shard / run.machine.pcie


def gradients_to_host(run: StepInputs, accumulation: int) -> float:
    """Of every micro batch, and the new parameters back once, unless they stay in the host."""
    if not run.layout.offload_optimizer:
        return 0.0
    shard = HALF * lora.count_trained_parameters(run.recipe, run.architecture) / run.layout.state_shards
    back = 0 if run.layout.offload_parameters else 1
    return (accumulation + back) * shard / run.machine.pcie


def optimizer(run: StepInputs) -> str:
    """Its name, as `optim` has it."""
    return str(run.recipe.trainer_args.get("optim") or "adamw_torch_fused")


def state_bytes(run: StepInputs) -> float:
    """That the optimizer keeps for each trained parameter, beside the parameter."""
    return optimizer_of(optimizer(run)).state_bytes(FULL)


def values_moved(run: StepInputs) -> int:
    """Fp32 values that a step reads and writes for each parameter: its gradient; the parameter and states twice."""
    return 1 + 2 * (1 + optimizer_of(optimizer(run)).states)


def optimizer_step(run: StepInputs) -> float:
    """On the GPU, each value once through its memory; on the host, at the rate of the code that does it there."""
    parameters = lora.count_trained_parameters(run.recipe, run.architecture)
    if not run.layout.offload_optimizer:
        moved = 2 * (FULL + state_bytes(run)) + FULL + HALF  # parameter and states twice, gradient, bf16 copy
        return parameters / run.layout.state_shards * moved / run.machine.memory
    return parameters / run.layout.nodes / host_rate(run)


def host_rate(run: StepInputs) -> float:
    """Parameters a second that a node's CPUs step: DeepSpeed's own code for Adam, torch's for all others."""
    torch_rate = efficiency.CPU_TORCH_VALUES_PER_S / values_moved(run)
    best = efficiency.CPU_ADAM_PER_S if "adam" in optimizer(run) else torch_rate
    return best * min(1.0, run.machine.cores / efficiency.CPU_OPTIMIZER_CORES)

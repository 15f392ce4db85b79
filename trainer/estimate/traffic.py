"""The seconds of moving bytes: between GPUs, between GPU and host, through the optimizer, and for checkpoints and starts.

ZeRO-3 and FSDP2 gather the parameters for the forward pass and again for the backward pass, and they reduce and scatter
the gradients of every micro batch. That is 3 times the parameters, while data parallelism moves 2 times (ZeRO,
arXiv:1910.02054, section 7). A gather or scatter of B bytes over n GPUs moves B x (n - 1) / n bytes per GPU
(https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). Between nodes the same amount passes a node's network.

The rates to and from the network are round figures for a cloud's own bucket and for the Hub. The events of a run have
the real ones (`committed` has bytes and seconds), and the caller may pass them in.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from trainer import memory
from trainer.estimate import efficiency
from trainer.estimate.arithmetic import HALF, StepInputs
from trainer.memory import lora
from trainer.memory.resident import optimizer_of

FULL = 4
"""Bytes of an fp32 value."""
STAGING_BYTES_PER_S = 8e9
"""Rate at which one process copies its state into memory that it has used before: half of 1 GiB in 0.064 s
(`bench/checkpoint.md`), because the processes of a node share its memory. A GPU's PCIe 4 connection has 25 GB/s."""
LOADING_BYTES_PER_S = 1.7e9
"""Rate at which one of eight processes fills its tensors from mapped files (`bench/reshard.md`)."""

DISK_BYTES_PER_S = 0.15e9
"""Rate at which a node writes to its disk: 512 GiB (the tasks' `disk_size`) with 0.28 MiB/s per GiB, Google's balanced
persistent disk (https://cloud.google.com/compute/docs/disks/performance). A local SSD is several times faster."""


class Rates(BaseModel):
    """The network rates of a node in GB/s, and the fixed times of a start in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bucket_gbps: float = Field(default=1.0, gt=0)
    """GB/s between one node and the bucket. A guess: a twelfth of a 100 Gbit/s network."""
    hub_gbps: float = Field(default=0.3, gt=0)
    """GB/s from the Hub, or wherever the model is. A guess."""
    start_s: float = Field(default=240.0, ge=0)
    """From the machine's start to a running supervisor: SkyPilot's set-up and the image pull. A guess."""
    import_s: float = Field(default=45.0, ge=0)
    """Imports of torch, Transformers and TRL (25 s without compiled files), and the preparation of the data set."""


def has_reference_pass(run: StepInputs) -> bool:
    """Whether each micro batch passes through the reference model too."""
    return run.layout.reference in ("model", "adapters_off")


def exposed_s(traffic_s: float, compute_s: float) -> float:
    """Return the seconds of traffic that arithmetic does not hide."""
    return traffic_s - min(efficiency.OVERLAP * traffic_s, compute_s)


def collective_s(run: StepInputs, size_bytes: float) -> float:
    """Return the seconds of a gather or a reduce-scatter of this many bytes over all processes."""
    count = run.layout.processes
    moved = size_bytes * (count - 1) / count
    within = moved / run.machine.link
    return max(within, moved / run.machine.network) if run.layout.nodes > 1 else within


def count_gathers(run: StepInputs) -> int:
    """Return how often each micro batch gathers the parameters."""
    return 2 + has_reference_pass(run)


def between_gpus_s(run: StepInputs, accumulation: int) -> float:
    """Return the seconds of traffic between GPUs in one optimizer step, if nothing hides it."""
    if run.layout.processes == 1:
        return 0.0
    gradients = lora.count_trained_parameters(run.recipe, run.architecture)
    parameters = HALF * run.architecture.parameters
    match run.layout.engine:
        case "zero3" | "fsdp2":
            micro = count_gathers(run) * collective_s(run, parameters) + collective_s(run, HALF * gradients)
            return accumulation * micro
        case "zero2":
            return accumulation * collective_s(run, HALF * gradients) + collective_s(run, HALF * gradients)
        case _:
            return 2 * collective_s(run, FULL * gradients)


def parameters_from_host_s(run: StepInputs, accumulation: int) -> float:
    """Return the seconds per step for offloaded parameters: each process copies its shard to the GPU for every gather."""
    if not run.layout.offload_parameters:
        return 0.0
    shard = HALF * run.architecture.parameters / run.layout.parameter_shards
    return accumulation * count_gathers(run) * shard / run.machine.pcie


def gradients_to_host_s(run: StepInputs, accumulation: int) -> float:
    """Return the seconds per step for the gradients of an offloaded optimizer, one copy per micro batch.

    The new parameters come back once per step, unless the parameters are offloaded too.
    """
    if not run.layout.offload_optimizer:
        return 0.0
    shard = HALF * lora.count_trained_parameters(run.recipe, run.architecture) / run.layout.state_shards
    back = 0 if run.layout.offload_parameters else 1
    return (accumulation + back) * shard / run.machine.pcie


def optimizer_name(run: StepInputs) -> str:
    """Return the recipe's `optim`, or TRL's default."""
    return str(run.recipe.trainer_args.get("optim") or "adamw_torch_fused")


def state_bytes(run: StepInputs) -> float:
    """Return the bytes of optimizer state per trained parameter."""
    return optimizer_of(optimizer_name(run)).state_bytes(FULL)


def count_moved_values(run: StepInputs) -> int:
    """Return the fp32 values that a step moves per parameter: the gradient once, the parameter and its states twice."""
    return 1 + 2 * (1 + optimizer_of(optimizer_name(run)).states)


def optimizer_step_s(run: StepInputs) -> float:
    """Return the seconds of an optimizer step: limited by GPU memory, or by the host's code if it is offloaded."""
    parameters = lora.count_trained_parameters(run.recipe, run.architecture)
    if not run.layout.offload_optimizer:
        moved = 2 * (FULL + state_bytes(run)) + FULL + HALF  # parameter and states twice, gradient, bf16 copy
        return parameters / run.layout.state_shards * moved / run.machine.memory
    return parameters / run.layout.nodes / parameters_per_s_on_host(run)


def parameters_per_s_on_host(run: StepInputs) -> float:
    """Return how many parameters per second a node's CPUs step. Adam runs DeepSpeed's code, other optimizers torch's."""
    torch_rate = efficiency.CPU_TORCH_VALUES_PER_S / count_moved_values(run)
    best = efficiency.CPU_ADAM_PER_S if "adam" in optimizer_name(run) else torch_rate
    return best * min(1.0, run.machine.cores / efficiency.CPU_OPTIMIZER_CORES)


def checkpoint_bytes(run: StepInputs) -> int:
    """Return the bytes that one save uploads."""
    return memory.checkpoint_bytes(run.recipe, run.architecture, run.layout)


def save_s(run: StepInputs) -> float:
    """Return the seconds that training waits for a save: every process copies its shard, or its share of a replica."""
    return checkpoint_bytes(run) / run.layout.processes / STAGING_BYTES_PER_S


def upload_s(run: StepInputs, rates: Rates) -> float:
    """Return the seconds of an upload, which runs in the background. All nodes upload at once."""
    return checkpoint_bytes(run) / run.layout.nodes / (rates.bucket_gbps * 1e9)


def restore_s(run: StepInputs, rates: Rates) -> float:
    """Return the seconds to download a whole checkpoint, as every node does, and to load it into memory."""
    loading = checkpoint_bytes(run) / run.layout.state_shards / LOADING_BYTES_PER_S
    return checkpoint_bytes(run) / (rates.bucket_gbps * 1e9) + loading


def load_s(run: StepInputs, rates: Rates) -> float:
    """Return the seconds from the start of a fresh node to its first step: set-up, model download and load, imports."""
    model = HALF * run.architecture.parameters if run.recipe.model_name_or_path else 0
    copies = 2 if run.layout.reference == "model" else 1
    reading = copies * model / LOADING_BYTES_PER_S
    return rates.start_s + model / (rates.hub_gbps * 1e9) + reading + rates.import_s

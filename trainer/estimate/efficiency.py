"""The real rates of a machine: the part of its peak that training reaches, and the overhead of the software.

Every factor has one physical meaning, and its source beside it. `bench/estimate.md` lists which published runs set a
factor and which only checked it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from trainer.hardware import Gpu, Shape

GIGA = 1e9
TERA = 1e12

MATMUL_EFFICIENCY: Mapping[tuple[int, int], float] = {(8, 0): 0.78, (9, 0): 0.56}
"""Part of the dense peak that matrix products of 7B layers reach, by compute capability. All other work of the GPU is
counted apart. Set from llm-foundry's A100 and H100 tables, 7b at 1k to 4k tokens, and for H100 from zephyr-7b-sft-full
too (links in `bench/estimate.md`). The H100's is lower because its power limit slows its clock."""
MATMUL_EFFICIENCY_HALF_RATE = 0.92
"""The same for GeForce boards. Their peak is halved when products are accumulated in fp32, so they nearly reach it
(https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A). Set from
torchtune's LoRA on an RTX 4090."""
HALF_RATE = frozenset({"RTX3090", "RTX4090"})
"""GeForce boards with the halved peak."""
MATMUL_EFFICIENCY_ELSEWHERE = 0.5
"""The same for GPUs that no published run set. It is below the others, so that no GPU looks the cheapest only because
it was never measured."""
MEMORY_EFFICIENCY = 0.8
"""Part of GPU memory's peak bandwidth that a long elementwise kernel reaches: BabelStream's part on A100 and V100
(https://github.com/UoB-HPC/BabelStream; some 85 to 90 % there), minus launches and tails."""
LINK_EFFICIENCY = 0.8
"""Part of the peak of NVLink or the network that NCCL's all-gather of large buffers reaches: some 230 of 300 GB/s on A100
(https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md, explains bus bandwidth)."""
PCIE_EFFICIENCY = 0.7
"""Part of PCIe's theoretical rate with pinned memory: 22 to 25 of 32 GB/s is usual on PCIe 4. A guess for shared
switches."""
OVERLAP = 0.0
"""Largest part of the traffic between GPUs that arithmetic hides. DeepSpeed tries to hide all of it (`overlap_comm`,
prefetch), but Qwen-72B's LoRA at 512 tokens on 4 GPUs, which set this value, hides none. In all other runs traffic
within a node is a few percent of a step."""
FLASH_EFFICIENCY = 0.5
"""FlashAttention-2's rate over that of a matrix product. It reaches 50 to 70 % of the peak on A100 and 35 % on H100
(arXiv:2307.08691, section 4.1; arXiv:2407.08608, abstract), and less in training with a causal mask."""
LAUNCH_S = 1e-5
"""Seconds that eager Python takes to start a kernel, which limits small batches. Set from Qwen-1.8B's LoRA at 256
tokens."""
KERNELS_PER_LAYER = 60
"""Kernels of one decoder layer's forward pass in eager Transformers, counted in modeling_mistral.py."""
KERNELS_PER_ADAPTER = 9
"""Kernels of PEFT's LoRA layer, counted: casts, dropout, two products, scale, add."""
EAGER_ATTENTION_BYTES = 39
"""Bytes moved per attention score in the forward pass: write, scale, mask, cast to fp32, softmax, cast back, dropout,
read. Counted in `eager_attention_forward` of Transformers' modeling_mistral.py. The backward pass moves as much again."""
CPU_ADAM_PER_S = 3.9e9
"""Parameters that DeepSpeedCPUAdam steps per second: 10 billion in 2.57 s on a DGX-2 (48 cores; ZeRO-Offload,
arXiv:2101.06840, table 4)."""
CPU_TORCH_VALUES_PER_S = 7 * 0.68e9
"""Fp32 values that torch's own optimizers move per second. Its Adam moves 7 values for each of 10 billion parameters in
14.76 s (same table; "5X to 7X" slower according to https://www.deepspeed.ai/tutorials/zero-offload)."""
CPU_OPTIMIZER_CORES = 48
"""Cores of that table's machine. More do not help, because memory is the limit. Fewer are slower in proportion."""
CPU_TFLOPS_PER_CORE = 0.07
"""TFLOP/s per core. Measured with LoRA of gemma-3-270m in bfloat16: a step of 2 sequences of 128 tokens takes 3.9 s on
two cores with AMX, for 8 x 0.27e9 x 256 FLOPs. Another CPU may reach a tenth of it."""
CPU_MEMORY_GBPS_PER_CORE = 5.0
"""GB/s of memory bandwidth per core, a round figure for a shared server."""
NODE_NETWORK_GBPS: Mapping[str, float] = {
    "A100": 12.5,
    "A100-80GB": 12.5,
    "H100": 125.0,
    "H200": 400.0,
    "L4": 12.5,
}
"""GB/s of a node of 8, one way: Google's A2, A3 High, A3 Ultra and G2
(https://cloud.google.com/compute/docs/gpus/gpu-network-bandwidth)."""
NODE_NETWORK_GBPS_ELSEWHERE = 3.0
"""Assumed for a node whose network is unknown: 25 Gbit/s."""


class Stack(BaseModel):
    """The bytes that the software moves through GPU memory around the matrix products, per token and layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    norm_bytes: float
    """Bytes of each norm, per element of the hidden state."""
    residual_bytes: float
    """Bytes of both residual additions together, per element of the hidden state."""
    rotary_bytes: float
    """Bytes of rotary positions, per element of queries and keys."""
    gate_bytes: float
    """Bytes of the gate, per element of the feed-forward layer."""
    adapter_input_bytes: float = 0.0
    """Bytes of LoRA's cast and dropout, per input element of an adapted projection."""
    adapter_output_bytes: float = 0.0
    """Bytes of LoRA's scale and addition, per output element of an adapted projection."""
    upcast: float = 1.0
    """A factor on all bytes above, for activations in fp32 instead of bf16."""


TRANSFORMERS = Stack(
    norm_bytes=32,
    residual_bytes=12,
    rotary_bytes=18,
    gate_bytes=10,
    adapter_input_bytes=12,
    adapter_output_bytes=10,
)
"""Transformers and PEFT in eager mode, kernel by kernel, with bf16 in and out. RMSNorm casts to fp32, squares, averages,
scales, casts back and multiplies (32 bytes per element). Rotary positions are two products, a negation, a
concatenation and an addition. The gate is an activation and a product. Counted in modeling_mistral.py and PEFT's
lora/layer.py."""
TRANSFORMERS_4BIT = TRANSFORMERS.model_copy(update={"upcast": 3.5})
"""The same for a model loaded in 4 bits. Its residual stream and the inputs and outputs of its projections are fp32, with
a cast at each (PEFT's `prepare_model_for_kbit_training`; bitsandbytes' `Linear4bit.forward`). Counting gives a factor of
2 to 2.5. The 3.5 is set from the evaluation of zephyr-7b-sft-qlora, which takes 2.5 times that of zephyr-7b-sft-full."""
FUSED = Stack(
    norm_bytes=4,
    residual_bytes=12,
    rotary_bytes=4,
    gate_bytes=6,
    adapter_input_bytes=2,
    adapter_output_bytes=4,
)
"""Kernels fused by hand (llm-foundry) or by torch.compile (torchtune), which read and write each value once."""


class Machine(NamedTuple):
    """The rates per second that one process reaches on its machine, after every efficiency factor."""

    name: str
    flops: float
    """FLOPs in matrix products."""
    memory: float
    """Bytes of GPU memory."""
    pcie: float
    """Bytes between host and GPU, one way."""
    link: float
    """Bytes between the GPUs of a node, one way, per GPU."""
    network: float
    """Bytes between nodes, one way, for a whole node."""
    launch_s: float
    """Seconds to start a kernel."""
    cores: int
    """CPU cores of a node."""
    measured: bool
    """Whether published runs set the efficiency of matrix products."""


def make_machine(shape: Shape, gpu: Gpu | None, network_gbps: float | None) -> Machine:
    """Return the rates of a shape with this GPU; without a GPU, the rates of its cores."""
    if gpu is None:
        return _make_cpu_machine(shape)
    peak = gpu.bf16_tflops or gpu.fp16_tflops
    network = network_gbps or NODE_NETWORK_GBPS.get(gpu.name, NODE_NETWORK_GBPS_ELSEWHERE)
    return Machine(
        name=gpu.name,
        flops=peak * TERA * matmul_efficiency(gpu),
        memory=gpu.memory_gbps * GIGA * MEMORY_EFFICIENCY,
        pcie=gpu.pcie_gbps * GIGA * PCIE_EFFICIENCY,
        link=gpu.link_gbps * GIGA * LINK_EFFICIENCY,
        network=network * GIGA * LINK_EFFICIENCY,
        launch_s=LAUNCH_S,
        cores=shape.cores,
        measured=is_measured(gpu),
    )


def is_measured(gpu: Gpu) -> bool:
    """Whether published runs set this GPU's efficiency."""
    return gpu.name in HALF_RATE or gpu.compute_capability in MATMUL_EFFICIENCY


def matmul_efficiency(gpu: Gpu) -> float:
    """Return the part of the dense peak that matrix products reach."""
    if gpu.name in HALF_RATE:
        return MATMUL_EFFICIENCY_HALF_RATE
    return MATMUL_EFFICIENCY.get(gpu.compute_capability, MATMUL_EFFICIENCY_ELSEWHERE)


def _make_cpu_machine(shape: Shape) -> Machine:
    memory = shape.cores * CPU_MEMORY_GBPS_PER_CORE * GIGA
    return Machine(
        name=f"{shape.cores} cores",
        flops=shape.cores * CPU_TFLOPS_PER_CORE * TERA,
        memory=memory,
        pcie=memory,
        link=memory,
        network=NODE_NETWORK_GBPS_ELSEWHERE * GIGA,
        launch_s=0.0,
        cores=shape.cores,
        measured=False,
    )

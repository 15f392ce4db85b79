"""How much of its peak a machine gives, and what software adds: every factor with its source.

Factors are few, and each has one physical meaning. `bench/estimate.md` says which published runs set one and which
only checked it.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from trainer.hardware import Gpu

MATMUL_EFFICIENCY: Mapping[tuple[int, int], float] = {(8, 0): 0.78, (9, 0): 0.56}
"""Of the dense peak, in the matrix products of 7B layers, by compute capability: the part that is left when what else
runs on the GPU is counted apart. Set from llm-foundry's A100 and H100 tables, 7b at 1k to 4k tokens, and for H100 from
zephyr-7b-sft-full too (links in `bench/estimate.md`). The H100's is lower because its power limit slows its clock."""
MATMUL_EFFICIENCY_HALF_RATE = 0.92
"""Of GeForce boards, whose peak is halved when products are added up in fp32, so that little keeps them from it
(https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A). Set from
torchtune's LoRA on an RTX 4090."""
HALF_RATE = frozenset({"RTX3090", "RTX4090"})
MATMUL_EFFICIENCY_ELSEWHERE = 0.5
"""No published run set it: below the others, so that no GPU looks the cheapest because nobody has measured it."""
MEMORY_EFFICIENCY = 0.8
"""Of GPU memory's peak, in a long elementwise kernel: BabelStream's share on A100 and V100
(https://github.com/UoB-HPC/BabelStream; some 85 to 90 % there), less launches and tails."""
LINK_EFFICIENCY = 0.8
"""Of NVLink or the network, in NCCL's all-gather of large buffers: some 230 of 300 GB/s on A100
(https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md, for what bus bandwidth is)."""
PCIE_EFFICIENCY = 0.7
"""Of PCIe's theoretical rate, pinned memory: 22 to 25 of 32 GB/s is usual on PCIe 4; a guess for shared switches."""
OVERLAP = 0.0
"""Part of the traffic between GPUs that hides behind arithmetic, at most. DeepSpeed means to hide all (`overlap_comm`,
prefetch); Qwen-72B's LoRA at 512 tokens on 4 GPUs, which set this, shows none. Within a node traffic is a few percent
of a step in all other runs."""
FLASH_EFFICIENCY = 0.5
"""FlashAttention-2's part of what a matrix product gets: 50 to 70 % of the peak on A100 and 35 % on H100
(arXiv:2307.08691, section 4.1; arXiv:2407.08608, abstract), in training with a causal mask less."""
LAUNCH_S = 1e-5
"""For Python in eager mode to start a kernel: what small batches wait for. Set from Qwen-1.8B's LoRA at 256 tokens."""
KERNELS_PER_LAYER = 60
"""Of one decoder layer in eager Transformers, forward: counted in modeling_mistral.py."""
KERNELS_PER_ADAPTER = 9
"""Cast, dropout, two products, scale, add; PEFT's LoRA layer, counted."""
EAGER_ATTENTION_BYTES = 39
"""Of each score, forward: written, scaled, masked, cast to fp32, soft-maxed, cast back, dropped out, read. Counted in
`eager_attention_forward` of Transformers' modeling_mistral.py; the backward pass moves as much again."""
CPU_ADAM_PER_S = 3.9e9
"""Parameters: DeepSpeedCPUAdam, 10 billion in 2.57 s on a DGX-2 (48 cores; ZeRO-Offload, arXiv:2101.06840, table 4)."""
CPU_TORCH_VALUES_PER_S = 7 * 0.68e9
"""Fp32 values that torch's own optimizers read and write: its Adam moves 7 for each of 10 billion parameters in 14.76 s
(same table; "5X to 7X" slower, says https://www.deepspeed.ai/tutorials/zero-offload)."""
CPU_OPTIMIZER_CORES = 48
"""Of the machine of that table. More do not help, since memory is what they wait for; fewer cost in proportion."""
CPU_TFLOPS_PER_CORE = 0.07
"""Training gemma-3-270m with LoRA in bfloat16, measured: 2 sequences of 128 tokens a step in 3.9 s on two cores with
AMX, 8 x 0.27e9 x 256 FLOPs. Another CPU may have a tenth of it."""
CPU_MEMORY_GBPS_PER_CORE = 5.0
"""A round figure for a shared server."""


class Stack(BaseModel):
    """The software around the matrix products, in bytes that it moves through GPU memory for each token and layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    norm_bytes: float
    """Of each norm, per element of the hidden state."""
    residual_bytes: float
    """Of both additions together, per element of the hidden state."""
    rotary_bytes: float
    """Per element of queries and keys."""
    gate_bytes: float
    """Per element of the inner layer."""
    adapter_input_bytes: float = 0.0
    """Of LoRA, per element that goes into an adapted projection: cast, dropout."""
    adapter_output_bytes: float = 0.0
    """Of LoRA, per element that comes out: scale, add."""
    upcast: float = 1.0
    """Times the bytes above, where activations are fp32 instead of bf16."""


TRANSFORMERS = Stack(
    norm_bytes=32,
    residual_bytes=12,
    rotary_bytes=18,
    gate_bytes=10,
    adapter_input_bytes=12,
    adapter_output_bytes=10,
)
"""Transformers and PEFT in eager mode, kernel by kernel, bf16 in and out: RMSNorm casts to fp32, squares, averages,
scales, casts back and multiplies (32 bytes an element); rotary positions are two products, a negation, a
concatenation and an addition; the gate is an activation and a product. Counted in modeling_mistral.py and PEFT's
lora/layer.py."""
TRANSFORMERS_4BIT = TRANSFORMERS.model_copy(update={"upcast": 3.5})
"""Loaded in 4 bits, the residual stream and what enters and leaves a projection are fp32, with a cast at each
(PEFT's `prepare_model_for_kbit_training`; bitsandbytes' `Linear4bit.forward`). By counting it is 2 to 2.5; 3.5 is set
from the evaluation of zephyr-7b-sft-qlora, which takes 2.5 times that of zephyr-7b-sft-full."""
FUSED = Stack(
    norm_bytes=4,
    residual_bytes=12,
    rotary_bytes=4,
    gate_bytes=6,
    adapter_input_bytes=2,
    adapter_output_bytes=4,
)
"""Kernels fused by hand (llm-foundry) or by torch.compile (torchtune): each value is read and written once."""

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
"""A node whose network nobody has told: 25 Gbit/s."""


def measured(gpu: Gpu) -> bool:
    """Whether published runs set this GPU's efficiency."""
    return gpu.name in HALF_RATE or gpu.compute_capability in MATMUL_EFFICIENCY


def matmul_efficiency(gpu: Gpu) -> float:
    """Of the dense peak, in matrix products."""
    if gpu.name in HALF_RATE:
        return MATMUL_EFFICIENCY_HALF_RATE
    return MATMUL_EFFICIENCY.get(gpu.compute_capability, MATMUL_EFFICIENCY_ELSEWHERE)

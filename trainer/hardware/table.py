"""The GPUs that clouds rent and people own: one row per board, with the documents that its figures come from.

Peaks are dense. Where NVIDIA prints a peak with sparsity, the row has half of it. For GeForce boards the row has the
peak with fp32 accumulation, which is what training uses. Rates are one-way; NVIDIA prints both ways for NVLink.

`usable_gib` is what torch calls the total capacity. It varies by about 0.2 GiB with the driver. Each row has the
smallest value found: in the thread that the row names, or else in public logs.
"""

from __future__ import annotations

import difflib
from functools import cache

from pydantic import BaseModel, ConfigDict

from trainer.errors import UserError
from trainer.hardware.shape import Shape

FLASH_ATTENTION_CAPABILITY = (8, 0)
"""Compute capability of Ampere, the oldest that FlashAttention 2 supports: https://github.com/Dao-AILab/flash-attention"""
USABLE_SHARE_OF_UNKNOWN = 0.95
"""Share of its memory that a GPU outside the table gives to processes. Derived: below the smallest in the table, the
T4's 0.97."""
MIB_PER_GIB = 1024
PCIE3, PCIE4, PCIE5 = 15.75, 31.51, 63.02
"""GB/s of 16 lanes, one way. Derived: 8, 16 and 32 GT/s in 128b/130b, https://pcisig.com/specifications"""

_SHEETS = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_PAGES = "https://www.nvidia.com/en-us/data-center"
_CAPABILITY = "https://developer.nvidia.com/cuda/gpus"
_TOTALS = "https://github.com/modal-labs/modal-client/pull/2797"  # nvidia-smi of seven boards
P4 = "https://images.nvidia.com/content/pdf/tesla/184457-Tesla-P4-Datasheet-NV-Final-Letter-Web.pdf"
P100 = f"{_SHEETS}/Data-Center/tesla-p100/pdf/nvidia-tesla-p100-PCIe-datasheet.pdf"
V100 = (
    "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
)
T4 = f"{_SHEETS}/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
TURING = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture"
    "/NVIDIA-Turing-Architecture-Whitepaper.pdf"
)
A100 = f"{_SHEETS}/Data-Center/a100/pdf/a100-80gb-datasheet-update-nvidia-us-1521051-r2-web.pdf"
A10 = f"{_SHEETS}/Data-Center/a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf"
A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
A40 = "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf"
GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
ADA_PRO = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/technologies"
    "/NVIDIA-ADA-GPU-PROVIZ-Architecture-Whitepaper_1.1.pdf"
)
H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
GH200 = "https://resources.nvidia.com/en-us-data-center-overview/grace-hopper-superchip-datasheet-partner"
B200 = "https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet"
B200_DENSE = "https://glennklockwood.com/garden/processors/B200"  # of NVIDIA's Blackwell brief, HGX at 1000 W
B200_BUS = "https://github.com/pytorch/ao/pull/4002"  # 7680 bits at 3996 MHz, and 178.35 GiB, from the driver
BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
BLACKWELL_PRO = f"{_SHEETS}/design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"


class Gpu(BaseModel):
    """The figures of one board. Peaks are dense and theoretical: programs reach only a part of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """SkyPilot's name: `A100`, `A100-80GB`, `L4`. Our own name where SkyPilot uses one for different boards: `H100-PCIE`."""
    memory_gib: float
    """The total that `nvidia-smi` shows."""
    usable_gib: float
    """What CUDA has for all processes together, their contexts included: `torch.cuda.mem_get_info()[1]`."""
    bf16_tflops: float | None
    """Dense peak of the tensor cores, accumulating in fp32. None if the hardware has no bf16."""
    fp16_tflops: float
    """The same for fp16. For boards without tensor cores: the faster of their fp16 and fp32 units."""
    memory_gbps: float
    """GPU memory, GB/s."""
    pcie_gbps: float
    """Host to GPU, one way, theoretical, GB/s: PCIe, or NVLink where the CPU has it."""
    link_gbps: float
    """GPU to GPU within a node, one way, theoretical, GB/s per GPU: NVLink with a switch, else PCIe."""
    compute_capability: tuple[int, int]
    sources: tuple[str, ...]
    """Public documents that the figures are from."""

    @property
    def has_bf16(self) -> bool:
        """Whether the hardware computes in bfloat16."""
        return self.bf16_tflops is not None

    @property
    def has_flash_attention(self) -> bool:
        """Whether FlashAttention 2 supports the board."""
        return self.compute_capability >= FLASH_ATTENTION_CAPABILITY


def _row(
    name: str,
    memory: tuple[int, float],
    tflops: tuple[float | None, float],
    gbps: tuple[float, float, float],
    capability: tuple[int, int],
    *sources: str,
) -> Gpu:
    """Return a board.

    `memory` is the MiB that `nvidia-smi` shows and the GiB that CUDA has; `tflops` the peaks of bf16 and fp16; `gbps`
    the rates of the memory, to the host, and to other GPUs.
    """
    return Gpu(
        name=name,
        memory_gib=memory[0] / MIB_PER_GIB,
        usable_gib=memory[1],
        bf16_tflops=tflops[0],
        fp16_tflops=tflops[1],
        memory_gbps=gbps[0],
        pcie_gbps=gbps[1],
        link_gbps=gbps[2],
        compute_capability=capability,
        sources=(*sources, _CAPABILITY),
    )


def _thread(place: str) -> str:
    """Return the URL of a discussion with a log in which torch prints the board's total capacity."""
    return f"https://github.com/{place}"


GPUS = (
    # Pascal has no tensor cores. The P4 has almost no fp16, so its peak is that of fp32.
    _row("P4", (7680, 7.43), (None, 5.5), (192, PCIE3, PCIE3), (6, 1), P4),
    _row(
        "P100",
        (16384, 15.89),
        (None, 18.7),
        (732, PCIE3, PCIE3),
        (6, 0),
        P100,
        _thread("googlecolab/colabtools/issues/950"),
    ),
    _row("V100", (16384, 15.77), (None, 125.0), (900, PCIE3, 150), (7, 0), V100),
    _row(
        "V100-32GB",
        (32768, 31.73),
        (None, 125.0),
        (900, PCIE3, 150),
        (7, 0),
        V100,
        _thread("liucongg/ChatGLM-Finetuning/issues/73"),
    ),
    _row(
        "T4",
        (15360, 14.56),
        (None, 65.0),
        (320, PCIE3, PCIE3),
        (7, 5),
        T4,
        TURING,
        _TOTALS,
        _thread("Zheng-Chong/CatVTON/issues/133"),
    ),
    _row("RTX6000", (24576, 23.64), (None, 130.5), (672, PCIE3, PCIE3), (7, 5), TURING),
    _row(
        "A100",
        (40960, 39.38),
        (312.0, 312.0),
        (1555, PCIE4, 300),
        (8, 0),
        A100,
        _TOTALS,
        _thread("TianheWu/CoSeR/issues/10"),
    ),
    _row("A100-PCIE", (40960, 39.38), (312.0, 312.0), (1555, PCIE4, PCIE4), (8, 0), A100, _TOTALS),
    _row(
        "A100-80GB",
        (81920, 79.14),
        (312.0, 312.0),
        (2039, PCIE4, 300),
        (8, 0),
        A100,
        _TOTALS,
        _thread("lianqi1008/Control-GIC/issues/6"),
    ),
    _row("A100-80GB-PCIE", (81920, 79.14), (312.0, 312.0), (1935, PCIE4, PCIE4), (8, 0), A100, _TOTALS),
    _row("A10", (23028, 21.98), (125.0, 125.0), (600, PCIE4, PCIE4), (8, 6), A10, _TOTALS),
    _row("A10G", (23028, 21.98), (70.0, 70.0), (600, PCIE4, PCIE4), (8, 6), A10G, _TOTALS),
    _row("A40", (46068, 44.34), (149.7, 149.7), (696, PCIE4, PCIE4), (8, 6), A40),
    _row("A6000", (49140, 47.27), (154.8, 154.8), (768, PCIE4, PCIE4), (8, 6), GA102),
    _row("RTX3090", (24576, 23.53), (71.0, 71.0), (936, PCIE4, PCIE4), (8, 6), GA102),
    _row(
        "L4",
        (23034, 21.95),
        (121.0, 121.0),
        (300, PCIE4, PCIE4),
        (8, 9),
        f"{_PAGES}/l4/",
        ADA,
        _TOTALS,
    ),
    _row(
        "L40",
        (46068, 44.34),
        (181.05, 181.05),
        (864, PCIE4, PCIE4),
        (8, 9),
        ADA,
        _thread("NVlabs/Eagle/issues/68"),
    ),
    _row(
        "L40S",
        (46068, 44.34),
        (362.05, 362.05),
        (864, PCIE4, PCIE4),
        (8, 9),
        f"{_PAGES}/l40s/",
        _TOTALS,
        _thread("vllm-project/vllm/issues/15598"),
    ),
    _row(
        "RTX4090",
        (24564, 23.52),
        (165.2, 165.2),
        (1008, PCIE4, PCIE4),
        (8, 9),
        ADA,
        _thread("Soul-AILab/SoulX-FlashTalk/issues/5"),
    ),
    _row("RTX6000-Ada", (49140, 47.27), (364.2, 364.2), (960, PCIE4, PCIE4), (8, 9), ADA_PRO),
    _row(
        "H100",
        (81559, 79.10),
        (989.4, 989.4),
        (3350, PCIE5, 450),
        (9, 0),
        H100,
        _TOTALS,
        _thread("huggingface/trl/issues/2688"),
    ),
    _row("H100-MEGA", (81559, 79.10), (989.4, 989.4), (3350, PCIE5, 450), (9, 0), H100, _TOTALS),
    _row("H100-PCIE", (81559, 79.10), (756.5, 756.5), (2000, PCIE5, PCIE5), (9, 0), H100),
    _row(
        "H100-NVL",
        (95830, 93.00),
        (835.5, 835.5),
        (3900, PCIE5, PCIE5),
        (9, 0),
        f"{_PAGES}/h100/",
        _thread("ali-vilab/VACE/issues/56"),
    ),
    _row("H200", (143771, 139.72), (989.4, 989.4), (4800, PCIE5, 450), (9, 0), f"{_PAGES}/h200/"),
    # The host is connected by NVLink-C2C. A node has one GPU.
    _row("GH200", (97871, 94.50), (989.4, 989.4), (4000, 450, PCIE5), (9, 0), GH200),
    _row("B200", (183359, 178.35), (2250.0, 2250.0), (7672, PCIE5, 900), (10, 0), B200, B200_DENSE, B200_BUS),
    _row(
        "RTX5090",
        (32607, 31.36),
        (209.5, 209.5),
        (1792, PCIE5, PCIE5),
        (12, 0),
        BLACKWELL,
        _thread("Wan-Video/Wan2.1/issues/465"),
    ),
    # The peak of the workstation board. For the server board, which clouds have, NVIDIA prints 1000 with sparsity.
    _row(
        "RTXPRO6000",
        (97887, 94.96),
        (503.8, 503.8),
        (1597, PCIE5, PCIE5),
        (12, 0),
        BLACKWELL_PRO,
        f"{_PAGES}/rtx-pro-6000-blackwell-server-edition/",
    ),
)

ALIASES = {
    "A100-40GB": "A100",
    "A100-SXM": "A100",
    "A100-80GB-SXM": "A100-80GB",
    "H100-SXM": "H100",
    "H200-SXM": "H200",
    "RTX6000Ada": "RTX6000-Ada",
    "RTXA6000": "A6000",
    "RTXPRO6000S": "RTXPRO6000",
}
"""Other names for the same boards in SkyPilot's catalogs."""


def known_gpu(name: str) -> Gpu | None:
    """Return a GPU of the table by any of its names, in upper or lower case, or None."""
    names, aliases = _by_name()
    folded = name.casefold()
    return names.get(folded) or names.get(aliases.get(folded, "").casefold())


def gpu(name: str) -> Gpu:
    """Return a GPU of the table by any of its names.

    Raises:
        UserError: the table has no such GPU. The hint has the nearest names.
    """
    found = known_gpu(name)
    if found is None:
        raise _unknown(name)
    return found


def gpu_of(shape: Shape) -> Gpu | None:
    """Return the board that a shape has. None without a GPU, or if the table does not have the board."""
    name = shape.board or shape.accelerator
    return known_gpu(name) if name else None


def has_bf16(board: Gpu | None) -> bool:
    """Return whether a board computes in bfloat16. A board outside the table counts as yes; the worker checks again."""
    return board is None or board.has_bf16


def usable_gib(shape: Shape) -> float | None:
    """Return what CUDA has for processes on one GPU of a shape, in GiB. None without a GPU.

    For a GPU outside the table this is a fixed share of its memory. For a part of a GPU (MIG, vGPU) it is the board's
    share of the part's memory.
    """
    if shape.memory_gib is None:
        return None
    board = gpu_of(shape)
    if board is None:
        return shape.memory_gib * USABLE_SHARE_OF_UNKNOWN
    return shape.memory_gib * board.usable_gib / board.memory_gib


@cache
def _by_name() -> tuple[dict[str, Gpu], dict[str, str]]:
    """Return the boards by name, and the names by alias. Keys are casefolded."""
    names = {board.name.casefold(): board for board in GPUS}
    return names, {alias.casefold(): name for alias, name in ALIASES.items()}


def _unknown(name: str) -> UserError:
    """Return the error for a name that the table does not have, with the nearest names as a hint."""
    names, aliases = _by_name()
    known = {**{folded: board.name for folded, board in names.items()}, **{a: a.upper() for a in aliases}}
    near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)
    suggestions = ", ".join(f"`{known[folded]}`" for folded in near)
    all_names = ", ".join(board.name for board in names.values())
    return UserError(
        f"no GPU `{name}` in the table",
        hint=f"did you mean {suggestions}?" if near else f"known: {all_names}",
    )

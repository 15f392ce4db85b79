"""The GPUs that clouds rent and people own: one row a board, with the documents its figures are from.

Peaks are dense: where NVIDIA prints them with sparsity, half of that; of GeForce boards the peak with fp32
accumulation, which is what training uses. Rates are of one way, where NVIDIA prints NVLink for both.

What CUDA has of the memory is what torch calls the total capacity. It changes by some 0.2 GiB with the driver;
each row has the least that was found: in the thread it names, or else in logs that lie about in public.
"""

from __future__ import annotations

from trainer.hardware.board import Gpu

MIB_PER_GIB = 1024
PCIE3, PCIE4, PCIE5 = 15.75, 31.51, 63.02
"""GB/s of 16 lanes, one way; derived: 8, 16 and 32 GT/s in 128b/130b, https://pcisig.com/specifications"""

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


def _row(
    name: str,
    memory: tuple[int, float],
    tflops: tuple[float | None, float],
    gbps: tuple[float, float, float],
    capability: tuple[int, int],
    *sources: str,
) -> Gpu:
    """Memory: MiB that `nvidia-smi` shows, GiB that CUDA has; peaks: bf16, fp16; rates: memory, host, GPUs."""
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
    """Where torch says what CUDA has of a board's memory."""
    return f"https://github.com/{place}"


GPUS = (
    # Pascal has no tensor cores, and the P4 hardly any fp16: its peak is of fp32.
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
    # The host is on NVLink-C2C; nodes have one of it.
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
    # Peak of the workstation's board; the server's, which clouds have, is printed as 1000 with sparsity.
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
"""Other names that SkyPilot's catalogs have for the same boards."""

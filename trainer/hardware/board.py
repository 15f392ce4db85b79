"""What a GPU can do: the figures of one board."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Gpu(BaseModel):
    """Figures of one board. Peaks are dense and theoretical: what a program gets of them is another matter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """SkyPilot's: `A100`, `A100-80GB`, `L4`; our own where SkyPilot's covers unlike boards: `H100-PCIE`."""
    memory_gib: float
    """Total that `nvidia-smi` shows."""
    usable_gib: float
    """What CUDA has for all processes together, their contexts included: `torch.cuda.mem_get_info()[1]`."""
    bf16_tflops: float | None
    """Dense peak of the tensor cores, accumulating in fp32; None: no bf16 in hardware."""
    fp16_tflops: float
    """The same for fp16; of boards without tensor cores, the faster of their fp16 and fp32 units."""
    memory_gbps: float
    """GPU memory, GB/s."""
    pcie_gbps: float
    """Host to GPU, one way, theoretical, GB/s: PCIe, or NVLink where the CPU has it."""
    link_gbps: float
    """GPU to GPU within a node, one way, theoretical, GB/s per GPU: NVLink with a switch, else PCIe."""
    compute_capability: tuple[int, int]
    sources: tuple[str, ...]
    """Public documents that the figures are from."""

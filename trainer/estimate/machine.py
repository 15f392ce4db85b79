"""What one process gets of its machine, in units a second."""

from __future__ import annotations

from typing import NamedTuple

from trainer.estimate import efficiency
from trainer.hardware import Gpu, Shape

GIGA = 1e9
TERA = 1e12


class Machine(NamedTuple):
    """Rates that a process really gets, after every efficiency."""

    name: str
    flops: float
    """In matrix products."""
    memory: float
    """Bytes of GPU memory."""
    pcie: float
    """Bytes between host and GPU, one way."""
    link: float
    """Bytes between the GPUs of a node, one way, for each."""
    network: float
    """Bytes between nodes, one way, for a whole node."""
    launch_s: float
    """To start a kernel."""
    cores: int
    """Of a node."""
    measured: bool
    """Whether published runs checked the rate of products."""


def machine(shape: Shape, gpu: Gpu | None, network_gbps: float | None) -> Machine:
    """Of a shape; without a GPU, its cores."""
    if gpu is None:
        return _cpu(shape)
    peak = gpu.bf16_tflops or gpu.fp16_tflops
    network = network_gbps or efficiency.NODE_NETWORK_GBPS.get(
        gpu.name, efficiency.NODE_NETWORK_GBPS_ELSEWHERE
    )
    return Machine(
        name=gpu.name,
        flops=peak * TERA * efficiency.matmul_efficiency(gpu),
        memory=gpu.memory_gbps * GIGA * efficiency.MEMORY_EFFICIENCY,
        pcie=gpu.pcie_gbps * GIGA * efficiency.PCIE_EFFICIENCY,
        link=gpu.link_gbps * GIGA * efficiency.LINK_EFFICIENCY,
        network=network * GIGA * efficiency.LINK_EFFICIENCY,
        launch_s=efficiency.LAUNCH_S,
        cores=shape.cores,
        measured=efficiency.measured(gpu),
    )


def _cpu(shape: Shape) -> Machine:
    memory = shape.cores * efficiency.CPU_MEMORY_GBPS_PER_CORE * GIGA
    return Machine(
        name=f"{shape.cores} cores",
        flops=shape.cores * efficiency.CPU_TFLOPS_PER_CORE * TERA,
        memory=memory,
        pcie=memory,
        link=memory,
        network=efficiency.NODE_NETWORK_GBPS_ELSEWHERE * GIGA,
        launch_s=0.0,
        cores=shape.cores,
        measured=False,
    )

"""The shape that a run runs on: equal nodes, each with its GPUs, cores and memory."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """The hardware of a run's nodes. The launcher builds the same value for nodes that are not rented yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accelerator: str | None
    """SkyPilot's name of the GPU, such as `A100-80GB`. None without a GPU."""
    count: int
    """GPUs of one node."""
    memory_gib: float | None
    """Memory of one GPU, as `nvidia-smi` shows it. If the GPUs differ, that of the smallest."""
    cores: int
    """Cores of one node that the process may use. A container may have fewer than the host."""
    host_memory_gib: float
    """Memory of one node that the process may use."""
    node: str
    """The machine's name. For a node that is not rented yet, its instance type."""
    nodes: int = Field(default=1, ge=1)
    """Number of machines. All are equal."""
    board: str | None = None
    """The GPU table's name if SkyPilot's name covers different boards: `H100-PCIE`, which SkyPilot calls `H100`."""

    @property
    def gpus(self) -> int:
        """GPUs of all nodes together."""
        return self.nodes * self.count

    def __str__(self) -> str:
        return f"{self.nodes} x {self.one_node}" if self.nodes > 1 else self.one_node

    @property
    def one_node(self) -> str:
        """The shape of one node as text: `A100:8`."""
        if self.accelerator:
            return f"{self.accelerator}:{self.count}"
        return f"cpu ({self.cores} core{'s' if self.cores > 1 else ''}, {self.host_memory_gib:.0f} GiB)"

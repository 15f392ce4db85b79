"""What a run has to run on: nodes of one kind, each with its GPUs, cores and memory."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """What nodes have; the launcher knows the same of nodes that it has not rented yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accelerator: str | None
    """SkyPilot's name of the GPU, as in `A100-80GB`; None without a GPU."""
    count: int
    """Of the GPUs of one node."""
    memory_gib: float | None
    """Of one GPU, as `nvidia-smi` shows it; of the smallest, if they differ."""
    cores: int
    """Of one node: those that this process may use, not those of the host."""
    host_memory_gib: float
    """Of one node: what this process may use."""
    node: str
    """The machine's name; of a node that is not rented yet, its instance type."""
    nodes: int = Field(default=1, ge=1)
    """Machines, all alike."""
    board: str | None = None
    """The GPU table's name where SkyPilot's covers unlike boards: `H100-PCIE`, which it calls `H100`."""

    @property
    def gpus(self) -> int:
        """GPUs of all nodes together."""
        return self.nodes * self.count

    def __str__(self) -> str:
        return f"{self.nodes} x {self.one_node}" if self.nodes > 1 else self.one_node

    @property
    def one_node(self) -> str:
        if self.accelerator:
            return f"{self.accelerator}:{self.count}"
        return f"cpu ({self.cores} core{'s' if self.cores > 1 else ''}, {self.host_memory_gib:.0f} GiB)"

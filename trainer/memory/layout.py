"""The layout of a run on its machines, and the memory terms. The other modules of this package build on both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Engine = Literal["single", "ddp", "zero2", "zero3", "fsdp2"]
Attention = Literal["flash_attention_2", "sdpa", "eager"]
Reference = Literal["none", "model", "adapters_off", "precomputed"]
ENGINE_TITLES: dict[Engine, str] = {
    "single": "one GPU",
    "ddp": "DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
"""The names of the engines as users see them."""
GIB = 2**30


class Frozen(BaseModel):
    """A value that cannot be changed and has no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Frozen):
    """How the work is split over processes, and what each process holds."""

    processes: int = Field(gt=0)
    """Processes over all nodes: one per GPU, or one per node when training on the CPU."""
    nodes: int = Field(default=1, gt=0)
    micro_batch: int = Field(gt=0)
    """Sequences (SFT) or pairs (DPO) that a process computes at a time."""
    engine: Engine
    """`single` and `ddp` hold the whole state in every process. ZeRO-2 shards gradients and optimizer state. ZeRO-3
    shards the parameters too (arXiv:1910.02054, section 5), and so does FSDP2 (arXiv:2304.11277)."""
    offload_optimizer: bool = False
    """Optimizer state and fp32 masters are in host memory, and the CPU steps them (ZeRO-Offload, arXiv:2101.06840)."""
    offload_parameters: bool = False
    """Parameters are in host memory too. Each layer is copied to the GPU when it is needed (ZeRO-Infinity,
    arXiv:2104.07857)."""
    attention: Attention
    activation_checkpointing: bool
    """Keep only the input of each layer, and compute the layer again in the backward pass (arXiv:1604.06174)."""
    reference: Reference
    """Where the log-probabilities of DPO's frozen reference come from: a second model (`model`), the policy without
    its adapter (`adapters_off`), or a pass before training (`precomputed`). `none` if the method needs none."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.processes % self.nodes:
            raise ValueError(f"{self.nodes} nodes cannot share {self.processes} processes evenly")
        if (self.engine == "single") != (self.processes == 1) and self.engine in ("single", "ddp"):
            raise ValueError(f"the engine {self.engine} cannot run {self.processes} processes")
        if self.offload_optimizer and not self.is_zero:
            raise ValueError(f"the engine {self.engine} cannot offload: only DeepSpeed's zero2 and zero3 can")
        if self.offload_parameters and not (self.engine == "zero3" and self.offload_optimizer):
            raise ValueError("parameters can be offloaded only with zero3 and an offloaded optimizer")
        return self

    @property
    def processes_per_node(self) -> int:
        return self.processes // self.nodes

    @property
    def state_shards(self) -> int:
        """The number of shards of gradients, masters and optimizer state; 1 if they are not sharded."""
        return self.processes if self.is_sharded else 1

    @property
    def parameter_shards(self) -> int:
        """The number of shards of the parameters; 1 if they are not sharded."""
        return self.processes if self.shards_parameters else 1

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a shard of the optimizer state."""
        return self.engine not in ("single", "ddp")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.engine in ("zero2", "zero3")

    @property
    def shards_parameters(self) -> bool:
        """Whether the parameters are sharded too, and gathered when they are needed."""
        return self.engine in ("zero3", "fsdp2")


class Term(Frozen):
    """The memory of one thing, such as the gradients or the activations."""

    name: str
    gib: float = Field(ge=0)
    why: str
    """The formula with its numbers."""

    @property
    def bytes(self) -> float:
        return self.gib * GIB


def make_term(name: str, size_bytes: float, why: str) -> Term:
    """Return a term from a size in bytes."""
    return Term(name=name, gib=size_bytes / GIB, why=why)


class Usage(Frozen):
    """The peak memory of one GPU or one host, term by term."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, terms: Iterable[Term]) -> Usage:
        """Return the usage of these terms, without those of 0 bytes."""
        return cls(terms=tuple(term for term in terms if term.gib))

    @property
    def gib(self) -> float:
        """The sum of all terms; 0 if there are none."""
        return sum(term.gib for term in self.terms)

    def gib_of(self, name: str) -> float:
        """Return the GiB of one term; 0 if there is no term of this name."""
        return sum(term.gib for term in self.terms if term.name == name)

"""How a run lies on its machines, and what it takes of their memory: values that others build on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Engine = Literal["single", "ddp", "zero2", "zero3", "fsdp2"]
Attention = Literal["flash_attention_2", "sdpa", "eager"]
Reference = Literal["none", "model", "adapters_off", "precomputed"]
GIB = 2**30


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Frozen):
    """A split of the work over processes, and what each of them holds."""

    processes: int = Field(gt=0)
    """Over all nodes: one for each GPU, or one on the CPU."""
    nodes: int = Field(default=1, gt=0)
    micro_batch: int = Field(gt=0)
    """Sequences (SFT) or pairs (DPO) that a process takes at a time."""
    engine: Engine
    """`single` and `ddp` hold the whole state in every process; ZeRO 2 shards gradients and optimizer, ZeRO 3 the
    parameters too (arXiv:1910.02054, section 5), as FSDP 2 does (arXiv:2304.11277)."""
    offload_optimizer: bool = False
    """Optimizer state and fp32 masters in host memory, stepped by the CPU (ZeRO-Offload, arXiv:2101.06840)."""
    offload_parameters: bool = False
    """Parameters in host memory too, brought to the GPU a layer at a time (ZeRO-Infinity, arXiv:2104.07857)."""
    attention: Attention
    activation_checkpointing: bool
    """Keep each layer's input only, and compute the layer again in the backward pass (arXiv:1604.06174)."""
    reference: Reference
    """DPO's frozen model: a second model, the policy without its adapter, or log-probabilities kept as data."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.processes % self.nodes:
            raise ValueError(f"{self.processes} processes on {self.nodes} nodes")
        if (self.engine == "single") != (self.processes == 1) and self.engine in ("single", "ddp"):
            raise ValueError(f"{self.engine} with {self.processes} processes")
        if self.offload_optimizer and not self.is_zero:
            raise ValueError(f"{self.engine} offloads nothing: DeepSpeed does")
        if self.offload_parameters and not (self.engine == "zero3" and self.offload_optimizer):
            raise ValueError("parameters are offloaded under ZeRO 3 only, after the optimizer")
        return self

    @property
    def processes_per_node(self) -> int:
        return self.processes // self.nodes

    @property
    def state_shards(self) -> int:
        """In how many parts gradients, masters and optimizer state are cut."""
        return self.processes if self.is_sharded else 1

    @property
    def parameter_shards(self) -> int:
        """In how many parts the parameters are cut."""
        return self.processes if self.cuts_parameters else 1

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the state only."""
        return self.engine not in ("single", "ddp")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.engine in ("zero2", "zero3")

    @property
    def cuts_parameters(self) -> bool:
        """Whether the parameters too are cut, and gathered as they are needed."""
        return self.engine in ("zero3", "fsdp2")


class Term(Frozen):
    """One thing that takes memory."""

    name: str
    gib: float = Field(ge=0)
    why: str
    """The formula with its numbers."""

    @property
    def bytes(self) -> float:
        return self.gib * GIB


def term(name: str, size_bytes: float, why: str) -> Term:
    return Term(name=name, gib=size_bytes / GIB, why=why)


class Usage(Frozen):
    """The peak of one GPU or one host, term by term."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, terms: Iterable[Term]) -> Usage:
        """The terms that take anything."""
        return cls(terms=tuple(each for each in terms if each.gib))

    @property
    def gib(self) -> float:
        """All of it; 0 if nothing is known or taken."""
        return sum(each.gib for each in self.terms)

    def gib_of(self, name: str) -> float:
        """Of one term; 0 if it is not there."""
        return sum(each.gib for each in self.terms if each.name == name)

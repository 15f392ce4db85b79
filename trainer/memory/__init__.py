"""What a run takes of the memory of its GPUs and hosts, term by term; no I/O."""

from trainer.memory.architecture import Architecture
from trainer.memory.layout import GIB, Attention, Engine, Layout, Reference, Term, Usage
from trainer.memory.lora import lora_of
from trainer.memory.states import Case
from trainer.memory.table import known_architecture
from trainer.memory.usage import checkpoint_bytes, staged_host, usage

__all__ = [
    "GIB",
    "Architecture",
    "Attention",
    "Case",
    "Engine",
    "Layout",
    "Reference",
    "Term",
    "Usage",
    "checkpoint_bytes",
    "known_architecture",
    "lora_of",
    "staged_host",
    "usage",
]

"""What a run takes of the memory of its GPUs and hosts, term by term; no I/O."""

from trainer.memory.layout import GIB, Attention, Engine, Layout, Reference, Term, Usage
from trainer.memory.lora import lora_of
from trainer.memory.resident import Case
from trainer.memory.usage import checkpoint_bytes, staged_host, usage

__all__ = [
    "GIB",
    "Attention",
    "Case",
    "Engine",
    "Layout",
    "Reference",
    "Term",
    "Usage",
    "checkpoint_bytes",
    "lora_of",
    "staged_host",
    "usage",
]

"""Predict the memory that a run takes on its GPUs and hosts, term by term. This package does no I/O."""

from trainer.memory.layout import GIB, Attention, Engine, Layout, Reference, Term, Usage
from trainer.memory.lora import lora_of
from trainer.memory.resident import Case
from trainer.memory.usage import checkpoint_bytes, predict_usage, predict_usage_with_staging

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
    "predict_usage",
    "predict_usage_with_staging",
]

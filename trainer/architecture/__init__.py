"""A model's structure: parameter counts and shapes, from a table, a config or a file's header."""

from trainer.architecture.architecture import Architecture
from trainer.architecture.table import known_architecture

__all__ = ["Architecture", "known_architecture"]

"""The structure of models: parameter counts and shapes, from a table, a `config.json` or a GGUF header."""

from trainer.architecture.architecture import Architecture
from trainer.architecture.table import known_architecture

__all__ = ["Architecture", "known_architecture"]

"""How a recipe runs on a shape: a pure decision, each choice with its reason, and the memory that it takes."""

from trainer.fit.decide import fit
from trainer.fit.result import Fit
from trainer.fit.ways import LARGEST_GPU_MICRO_BATCH, LARGEST_MICRO_BATCH
from trainer.fit.wishes import reference_of

__all__ = ["LARGEST_GPU_MICRO_BATCH", "LARGEST_MICRO_BATCH", "Fit", "fit", "reference_of"]

"""How a recipe runs on a shape: a pure decision, each choice with its reason, and the memory that it takes."""

from trainer.fit.candidates import LARGEST_GPU_MICRO_BATCH, LARGEST_MICRO_BATCH
from trainer.fit.decide import fit
from trainer.fit.recipe_choices import reference_of
from trainer.fit.result import Fit

__all__ = ["LARGEST_GPU_MICRO_BATCH", "LARGEST_MICRO_BATCH", "Fit", "fit", "reference_of"]

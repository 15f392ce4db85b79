"""Choose how a recipe runs on a shape. The choice is a pure function; each part of it has a reason and a memory need."""

from trainer.fit.candidates import LARGEST_GPU_MICRO_BATCH, LARGEST_MICRO_BATCH
from trainer.fit.decide import Fit, fit
from trainer.fit.recipe_choices import reference_of

__all__ = ["LARGEST_GPU_MICRO_BATCH", "LARGEST_MICRO_BATCH", "Fit", "fit", "reference_of"]

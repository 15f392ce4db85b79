"""Which kept log-probabilities a run may use, found by what its recipe says."""

from __future__ import annotations

from trainer.bucket.reference import Shelf, open_shelf
from trainer.fit import Fit
from trainer.recipe import Recipe
from trainer.recipe.reference import reference_key


def shelf_for(recipe: Recipe, planned: Fit, checkpoints: str, *, run_id: str, attempt: int) -> Shelf | None:
    """None if the run computes no log-probabilities beforehand.

    Raises:
        BucketError, Unavailable: as `open_shelf`.
    """
    if planned.reference != "precomputed":
        return None
    return open_shelf(checkpoints, reference_key(recipe), run_id=run_id, attempt=attempt)

"""What TRL is told of the fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import DPOConfig

from tests.training.jobs import SMALL, make_job
from trainer.worker.arguments import training_arguments


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("fitted", [True, False])
def test_checkpointing_is_the_recipes_or_else_the_fits(
    tmp_path: Path, said: bool | None, fitted: bool
) -> None:
    """On a CPU as on a GPU; TRL's own default has no say."""
    job = make_job(tmp_path / "job", "zephyr-tiny/dpo", *SMALL)
    silent = {key: value for key, value in job.recipe.trainer_args.items() if key != "gradient_checkpointing"}
    told = silent | ({} if said is None else {"gradient_checkpointing": said})
    job = job.model_copy(
        update={
            "recipe": job.recipe.model_copy(update={"trainer_args": told}),
            "fit": job.fit.model_copy(update={"activation_checkpointing": fitted}),
        }
    )
    assert training_arguments(DPOConfig, job).gradient_checkpointing is (fitted if said is None else said)

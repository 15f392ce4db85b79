"""The finished model, as a folder that `from_pretrained` loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from trainer.job import Job
from trainer.staged import Staged, mark_staged
from trainer.worker.chat import Tokenizer
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.model_source import Base

log = logging.getLogger(__name__)
FOLDER = "final"


def export(  # noqa: PLR0913 (what a finished model consists of)
    model: Any,
    tokenizer: Tokenizer,
    base: Base,
    job: Job,
    *,
    step: int,
    about: Identity,
    weights: dict[str, Any] | None = None,
) -> Path:
    """Write `staging/final/` and mark it staged; `weights` where the model has not its own.

    A full model is written whole; LoRA as an adapter that names the recipe's model. Where the base
    lives in this attempt's folder only (`init: tiny`, or an adapter as the recipe's model), nobody could
    load such an adapter: it is merged into the base and the sum is written, as a full model.
    """
    into = job.staging / FOLDER
    _write(model, base, job, about, {} if weights is None else {"state_dict": weights})
    tokenizer.save_pretrained(into)
    mark_staged(
        job.staging, Staged(folder=FOLDER, step=step, kind="final", details=about.model_dump(mode="json"))
    )
    return into


def _write(model: Any, base: Base, job: Job, about: Identity, weights: dict[str, Any]) -> None:
    from peft import PeftModel

    into = job.staging / FOLDER
    if not isinstance(model, PeftModel):
        model.save_pretrained(into, **weights)
        return
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name or base.path
    config.revision = job.recipe.model_args.get("model_revision")
    if base.name is not None:
        model.save_pretrained(into, **weights)
        return
    from trainer.worker import merge

    model.save_pretrained(job.work / "adapter", **weights)
    merge.merge(base, job.work / "adapter", job.recipe, job.fit, into, trained_on=about.model)

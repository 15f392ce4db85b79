"""Which recipes may share the log-probabilities of a DPO reference, by what they say."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import xxhash

from trainer.recipe.model import Recipe

FIELDS = {
    "model_name_or_path",
    "init",
    "dataset_mixture",
    "max_prompt_length",
    "truncation_side",
    "chat_template",
    "auto_insert_empty_system_msg",
    "max_train_samples",
}
ARGUMENTS = (
    "max_length",
    "truncation_mode",
    "ld_alpha",
    "model_revision",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
)


def reference_key(recipe: Recipe) -> str:
    """XXH3 (128 bits, hex) of what decides model and training data. Where it is too coarse, a changed file say, the
    worker's fingerprint tells the difference; where too fine, something is computed twice.
    """
    said: dict[str, Any] = recipe.model_dump(mode="json", include=FIELDS)
    said["dataset_mixture"].pop("test_datasets")
    if recipe.init:
        said |= {"tiny": recipe.tiny.model_dump(), "seed": recipe.seed}
    for source in (*said["dataset_mixture"]["datasets"],):
        source["id"] = _portable(source["id"])
    said["model_name_or_path"] = _portable(said["model_name_or_path"])
    arguments = {**recipe.trainer_args, **recipe.model_args}
    said |= {name: arguments.get(name) for name in ARGUMENTS}
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def _portable(path: str | None) -> str | None:
    """A local path without its folder, which differs between machines."""
    return PurePath(path).name if path and PurePath(path).is_absolute() else path

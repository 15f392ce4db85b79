"""Load a recipe from flat YAML with the key names of TRL and Transformers: check every key, and build a `Recipe`."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from trainer.errors import DataError, ModelError, RecipeError, UserError
from trainer.method import METHODS
from trainer.recipe import fields, mixture, yaml_file
from trainer.recipe.fields import Field
from trainer.recipe.gather import BATCH, RecipeKeys, gather
from trainer.recipe.model import LEAST_CHECKPOINTS, DataSource, Mixture, Recipe, TinyModel
from trainer.recipe.translate import UNDERSTOOD, Keys, show
from trainer.recipe.yaml_file import COMMAND_LINE, names

__all__ = ["DataSource", "Loaded", "Mixture", "Recipe", "TinyModel", "default_run_id", "load", "names"]

OURS = {
    "name": Field("str"),
    "method": Field("str", choices=tuple(METHODS)),
    "model_name_or_path": Field("str | None"),
    "init": Field("str | None", choices=("tiny",)),
    "tiny": Field("dict"),
    "dataset_mixture": Field("dict"),
    "global_batch_size": Field("int"),
    "micro_batch_size": Field("int | None"),
    "engine": Field("str | None", choices=("ddp", "zero2", "zero3", "fsdp2")),
    "offload": Field("str | None", choices=("none", "optimizer", "all")),
    "max_prompt_length": Field("int | None"),
    "truncation_side": Field("str | None", choices=("left", "right")),
    "chat_template": Field("str | None"),
    "auto_insert_empty_system_msg": Field("bool"),
    "max_train_samples": Field("int | None"),
    "max_test_samples": Field("int | None"),
}
"""The keys of this project, beside those of TRL's classes."""
NESTED = (*TinyModel.model_fields, *Mixture.model_fields, *DataSource.model_fields)
"""Names of nested keys, for suggestions."""
IMPORTED_GPUS = 8
"""GPUs that the recipes of the alignment-handbook were written for."""
BUCKETS = ("s3://", "gs://")
SAVE_STEPS = 50
LONGEST_NAME = 90
"""Characters of the recipe's name that a default run id contains."""
LOCAL_ENDINGS = (".jsonl", ".json", ".parquet", ".gguf")
LOCAL_STARTS = ("./", "../", "/", "~")
"""Names with these endings or starts can only be paths, never Hub ids."""
STATED = (
    "seed",
    "learning_rate",
    "num_train_epochs",
    "lr_scheduler_type",
    "optim",
    "max_length",
    "beta",
    "loss_type",
)
"""Keys whose defaults changed between releases of TRL and Transformers. A loaded recipe always states them."""


class Loaded(NamedTuple):
    """A recipe, and notes about everything that the reader changed or ignored, one line each."""

    recipe: Recipe
    notes: tuple[str, ...]


def load(source: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load a recipe from a file, or by a name such as `zephyr-tiny/dpo`, and apply `key=value` overrides.

    Raises:
        RecipeError: there is no such recipe, a key is unknown, a value has the wrong type, keys contradict each other,
            or a value is a secret.
        DataError: a local data file does not exist.
        ModelError: a local model does not exist.
    """
    path = yaml_file.find(source)
    given = gather(path, yaml_file.parse(overrides))
    method = _method(given, path)
    _check_names(given, method)
    keys = _in_their_types(given, method)
    _check_numbers(keys, given)
    keys["global_batch_size"] = _global_batch(keys, given)
    _place_files(keys, given, path.parent)
    _settle(keys, method, given.notes)
    keys.setdefault("name", _name(path, method))
    return Loaded(_build({**keys, "method": method}, given), tuple(given.notes))


def default_run_id(recipe: Recipe) -> str:
    """Return the id of a run whose user names none: the recipe's name, and a part of its digest to distinguish recipes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.name).lstrip("-._")[:LONGEST_NAME] or recipe.method
    return f"{name}-{recipe.digest()[:8]}"


def _method(given: RecipeKeys, path: Path) -> str:
    """Return the recipe's method. Without the key, infer it from the file's name or folder, or from its other keys."""
    if "method" in given.keys:
        return str(_convert("method", given.keys["method"], OURS["method"], given))
    by_place = {part for part in (path.stem, path.parent.name) if part in METHODS}
    by_keys = {method for method in METHODS if _keys_of_only(method) & set(given.keys)}
    for found, reason in ((by_place, "the file's name or folder"), (by_keys, "the keys that the file has")):
        if len(found) == 1:
            method = found.pop()
            given.notes.append(f"`method: {method}` is inferred from {reason}")
            return method
    choices = " or ".join(f"`method: {method}`" for method in METHODS)
    raise RecipeError(f"{given.file} has no `method`, and none can be inferred", hint=f"add {choices}")


def _keys_of_only(method: str) -> set[str]:
    """Return the keys that only this method's recipes have."""
    others: set[str] = set().union(*(_known(other) for other in METHODS if other != method))
    return set(_known(method)) - others


def _known(method: str) -> dict[str, Field]:
    """Return every key that a recipe of the method can have."""
    foreign = {key for other in METHODS.values() if other.name != method for key in other.recipe_keys}
    foreign -= set(METHODS[method].recipe_keys)
    ours = {key: field for key, field in OURS.items() if key not in foreign}
    return {**fields.of(method), **fields.of("model"), **ours}


def _check_names(given: RecipeKeys, method: str) -> None:
    """Raise one error that names all unknown keys."""
    known = _known(method)
    unknown = [key for key in given.keys if key not in known]
    if not unknown:
        return
    by_source: dict[str, list[str]] = {}
    for key in unknown:
        by_source.setdefault(given.source(key), []).append(f"`{key}` (value {show(given.keys[key])})")
    message = "\n".join(
        f"{source}: unknown key{'s' if len(keys) > 1 else ''} {', '.join(keys)}"
        for source, keys in by_source.items()
    )
    hints = {key: _hint_for(key, known, method) for key in unknown}
    if len(unknown) > 1:
        hints = {key: f"`{key}`: {hint}" for key, hint in hints.items() if hint}
    raise RecipeError(message, hint="\n  ".join(hint for hint in hints.values() if hint) or None)


def _hint_for(key: str, known: dict[str, Field], method: str) -> str:
    """Return a hint for an unknown key; empty if there is none."""
    others = [other for other in METHODS if other != method and key in _known(other)]
    if others:
        return f"it is a key of {' and '.join(others)}, and this recipe is {method}"
    near = fields.nearest(key, {*known, *UNDERSTOOD})
    return f"did you mean `{near}`?" if near else ""


def _in_their_types(given: RecipeKeys, method: str) -> Keys:
    known = _known(method)
    return {key: _convert(key, value, known[key], given) for key, value in given.keys.items()}


def _convert(key: str, value: Any, field: Field, given: RecipeKeys) -> Any:
    try:
        return fields.convert(value, field)
    except ValueError as error:
        raise RecipeError(f"{given.source(key)}: `{key}: {show(value)}` {error}") from None


def _check_numbers(keys: Keys, given: RecipeKeys) -> None:
    """Raise if a number would make training fail at its first step, or train nothing."""
    by_steps = (keys.get("max_steps") or 0) > 0
    below = {
        "learning_rate": (0, "is below zero"),
        "max_length": (1, "leaves no tokens"),
        "save_steps": (sys.float_info.min, "would save no checkpoint before the end"),
        "num_train_epochs": (-math.inf if by_steps else sys.float_info.min, "trains nothing"),
    }
    for key, (least, why) in below.items():
        if keys.get(key) is not None and keys[key] < least:
            raise RecipeError(f"{given.source(key)}: `{key}: {show(keys[key])}` {why}")


def _global_batch(keys: Keys, given: RecipeKeys) -> int:
    """Return the global batch size, and remove TRL's keys for it.

    An imported recipe has a batch per GPU instead. It was written for `IMPORTED_GPUS` GPUs.
    """
    imported = {key: keys.pop(key) for key in BATCH if key in keys}
    if "global_batch_size" in keys:
        if imported:
            others = " and ".join(f"`{key}` ({given.source(key)})" for key in imported)
            raise RecipeError(
                f"{given.source('global_batch_size')}: `global_batch_size` is given, and so is {others}",
                hint=f"drop {' and '.join(f'`{key}`' for key in imported)}; `micro_batch_size` limits one process",
            )
        return int(keys["global_batch_size"])
    if BATCH[0] not in imported:
        raise RecipeError(
            f"{given.file} has no `global_batch_size`", hint="add one, such as `global_batch_size: 128`"
        )
    per_device, accumulation = imported[BATCH[0]], imported.get(BATCH[1], 1)
    size = int(per_device * accumulation * IMPORTED_GPUS)
    given.notes.append(
        f"`global_batch_size: {size}` = {BATCH[0]} {per_device} x {BATCH[1]} {accumulation} x {IMPORTED_GPUS} GPUs; "
        f"set `global_batch_size` if the recipe was written for another number of GPUs than {IMPORTED_GPUS}"
    )
    return size


def _place_files(keys: Keys, given: RecipeKeys, folder: Path) -> None:
    """Make local paths absolute.

    A path in the file is looked up in the file's folder first, one on the command line in the current folder first.
    """

    def resolve(key: str, name: str, error: type[DataError | ModelError]) -> str:
        is_typed = given.source(key) == COMMAND_LINE
        folders = [Path.cwd(), folder] if is_typed else [folder, Path.cwd()]
        return resolve_path(name, folders=folders, error=error)

    if isinstance(keys.get("model_name_or_path"), str):
        keys["model_name_or_path"] = resolve("model_name_or_path", keys["model_name_or_path"], ModelError)
    data = keys["dataset_mixture"]
    for source in (*data.get("datasets", ()), *data.get("test_datasets", ())):
        if isinstance(source.get("id"), str):
            _check_uri(source["id"])
            source["id"] = resolve("dataset_mixture", source["id"], DataError)


def _check_uri(data: str) -> None:
    """Raise if a URI is anything but a data file in a bucket. All other data are local or on the Hub."""
    if "://" in data and not (data.startswith(BUCKETS) and mixture.is_file(data)):
        raise DataError(
            f"{data} is not a data file in a bucket",
            hint="give one such as s3://BUCKET/pairs.jsonl or gs://BUCKET/pairs.parquet, a Hub id, or a local file",
        )


def _settle(keys: Keys, method: str, notes: list[str]) -> None:
    """Write out the defaults that a run relies on, and correct values that a run cannot use."""
    known = fields.of(method)
    # A later release of TRL may have other defaults. A run must not change with it.
    for key in STATED:
        if key in known:
            keys.setdefault(key, known[key].default)
    keys.setdefault("save_steps", SAVE_STEPS)
    keys.setdefault("dtype", fields.of("model")["dtype"].default)
    limit = keys.get("save_total_limit") or LEAST_CHECKPOINTS
    if limit < LEAST_CHECKPOINTS:
        notes.append(
            f"`save_total_limit: {limit}` is raised to {LEAST_CHECKPOINTS}: the newest checkpoint may be damaged"
        )
    keys["save_total_limit"] = max(limit, LEAST_CHECKPOINTS)
    if keys.get("truncation_side", "") is None:
        del keys["truncation_side"]
    # An override may have replaced the data, and with them the test data of the file.
    data = keys["dataset_mixture"]
    strategy = keys.get("eval_strategy", "no")
    if strategy != "no" and not data.get("test_datasets") and data.get("test_split_size") is None:
        notes.append(f"`eval_strategy: {strategy}` is ignored: the recipe has no test data")
        keys["eval_strategy"] = "no"
    lora = [f"`{key}`" for key in keys if key.startswith("lora_")]
    if lora and not keys.get("use_peft"):
        notes.append(f"{', '.join(lora)} without effect: no LoRA is trained without `use_peft: true`")


def _name(path: Path, method: str) -> str:
    """Return a recipe's name from its path: `zephyr-tiny/dpo`, or `zephyr-7b-beta/dpo_qlora` in the handbook's folders."""
    if path.parent.name == method:
        variant = path.stem.removeprefix("config").strip("_")
        return f"{path.parent.parent.name}/{method}" + (f"_{variant}" if variant else "")
    return f"{path.parent.name}/{path.stem}" if path.stem.partition("_")[0] == method else path.stem


def _build(keys: Keys, given: RecipeKeys) -> Recipe:
    """Build the recipe. An error that pydantic finds is raised again with the file's name."""
    model = {key: keys.pop(key) for key in fields.of("model") if key in keys and key not in OURS}
    ours = {key: keys.pop(key) for key in OURS if key in keys}
    try:
        return Recipe(**ours, trainer_args=keys, model_args=model)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        near = fields.nearest(key.rpartition(".")[2], NESTED) if unknown else None
        raise RecipeError(
            f"{given.source(str(first['loc'][0]))}: `{key}`: {'unknown key' if unknown else first['msg']} "
            f"(value {show(first['input'])})",
            hint=f"did you mean `{near}`?" if near else None,
        ) from None


def resolve_path(name: str, *, folders: Sequence[Path], error: type[UserError]) -> str:
    """Return the absolute path of a file or folder that exists in one of `folders`, else the name itself.

    Raises:
        UserError: of class `error`, if the name can only be a path, and nothing exists there.
    """
    if "://" in name or name.startswith("generated:"):
        return name
    path = Path(name).expanduser()
    candidates = list(dict.fromkeys((folder / path).resolve() for folder in folders))
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    if name.lower().endswith(LOCAL_ENDINGS) or name.startswith(LOCAL_STARTS) or name in (".", ".."):
        raise error(
            f"{name} does not exist",
            hint="looked for " + " and ".join(str(candidate) for candidate in candidates),
        )
    return name

"""What to train: a recipe, read from flat YAML with TRL's and Transformers' own key names."""

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
NESTED = (*TinyModel.model_fields, *Mixture.model_fields, *DataSource.model_fields)
IMPORTED_GPUS = 8
"""What the recipes of the alignment-handbook were written for."""
BUCKETS = ("s3://", "gs://")
SAVE_STEPS = 50
LONGEST_NAME = 90
"""Characters of a recipe's name that its run's has."""
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
"""Keys whose defaults changed over the releases of TRL and Transformers: always written out."""


class Loaded(NamedTuple):
    """A recipe, and what was read otherwise than it is written, a line each."""

    recipe: Recipe
    notes: tuple[str, ...]


def load(source: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """The recipe of a file, or of a name such as `zephyr-tiny/dpo`, with `key=value` overrides.

    Raises:
        RecipeError: no such recipe, a key that nobody knows, a value of the wrong type, keys that
            cannot go together, or a secret.
        DataError: a local data file that is not there.
        ModelError: a local model that is not there.
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
    """A run's name for who gives none: the recipe's, and enough of its digest to keep others apart."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.name).lstrip("-._")[:LONGEST_NAME] or recipe.method
    return f"{name}-{recipe.digest()[:8]}"


def _method(given: RecipeKeys, path: Path) -> str:
    """The method that is said; else the one that the file's place or its keys can only mean."""
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
    """Every key that a recipe of the method can have."""
    foreign = {key for other in METHODS.values() if other.name != method for key in other.recipe_keys}
    foreign -= set(METHODS[method].recipe_keys)
    ours = {key: field for key, field in OURS.items() if key not in foreign}
    return {**fields.of(method), **fields.of("model"), **ours}


def _check_names(given: RecipeKeys, method: str) -> None:
    """All the keys that nobody knows, in one error."""
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
    """Those with which training would end at its first step, or with nothing."""
    by_steps = (keys.get("max_steps") or 0) > 0
    below = {
        "learning_rate": (0, "is below zero"),
        "max_length": (1, "leaves no tokens"),
        "save_steps": (sys.float_info.min, "would keep nothing before the end"),
        "num_train_epochs": (-math.inf if by_steps else sys.float_info.min, "trains nothing"),
    }
    for key, (least, why) in below.items():
        if keys.get(key) is not None and keys[key] < least:
            raise RecipeError(f"{given.source(key)}: `{key}: {show(keys[key])}` {why}")


def _global_batch(keys: Keys, given: RecipeKeys) -> int:
    """The global batch as said, or as an imported recipe means it; takes its keys out."""
    imported = {key: keys.pop(key) for key in BATCH if key in keys}
    if "global_batch_size" in keys:
        if imported:
            said = " and ".join(f"`{key}` ({given.source(key)})" for key in imported)
            raise RecipeError(
                f"{given.source('global_batch_size')}: `global_batch_size` is given, and so is {said}",
                hint=f"drop {' and '.join(f'`{key}`' for key in imported)}; `micro_batch_size` limits one process",
            )
        return int(keys["global_batch_size"])
    if BATCH[0] not in imported:
        raise RecipeError(
            f"{given.file} does not say its batch", hint="add `global_batch_size: 128`, or what you want"
        )
    each, accumulation = imported[BATCH[0]], imported.get(BATCH[1], 1)
    whole = int(each * accumulation * IMPORTED_GPUS)
    given.notes.append(
        f"`global_batch_size: {whole}` = {BATCH[0]} {each} x {BATCH[1]} {accumulation} x {IMPORTED_GPUS} GPUs; "
        "say `global_batch_size` if it was meant for other than 8"
    )
    return whole


def _place_files(keys: Keys, given: RecipeKeys, folder: Path) -> None:
    """Make local paths absolute: those of the file from its own folder first, a command line's from here."""

    def resolve(key: str, name: str, error: type[DataError | ModelError]) -> str:
        here = [Path.cwd(), folder] if given.source(key) == COMMAND_LINE else [folder, Path.cwd()]
        return resolve_path(name, folders=here, error=error)

    if isinstance(keys.get("model_name_or_path"), str):
        keys["model_name_or_path"] = resolve("model_name_or_path", keys["model_name_or_path"], ModelError)
    data = keys["dataset_mixture"]
    for source in (*data.get("datasets", ()), *data.get("test_datasets", ())):
        if isinstance(source.get("id"), str):
            _check_uri(source["id"])
            source["id"] = resolve("dataset_mixture", source["id"], DataError)


def _check_uri(data: str) -> None:
    """Of data elsewhere than here and on the Hub only a file in a bucket can be read."""
    if "://" in data and not (data.startswith(BUCKETS) and mixture.is_file(data)):
        raise DataError(
            f"{data} is no data file in a bucket",
            hint="as in s3://BUCKET/pairs.jsonl or gs://BUCKET/pairs.parquet; or a Hub id, or a file here",
        )


def _settle(keys: Keys, method: str, notes: list[str]) -> None:
    """State what a run relies on, and set right what it could not go by."""
    known = fields.of(method)
    for key in STATED:
        if key in known:
            keys.setdefault(key, known[key].default)
    keys.setdefault("save_steps", SAVE_STEPS)
    keys.setdefault("dtype", fields.of("model")["dtype"].default)
    kept = keys.get("save_total_limit") or LEAST_CHECKPOINTS
    if kept < LEAST_CHECKPOINTS:
        notes.append(
            f"`save_total_limit: {kept}` is read as {LEAST_CHECKPOINTS}: the newest may turn out damaged"
        )
    keys["save_total_limit"] = max(kept, LEAST_CHECKPOINTS)
    if keys.get("truncation_side", "") is None:
        del keys["truncation_side"]
    data = keys["dataset_mixture"]
    strategy = keys.get("eval_strategy", "no")
    if strategy != "no" and not data.get("test_datasets") and data.get("test_split_size") is None:
        notes.append(f"`eval_strategy: {strategy}` is ignored: the recipe has no test data")
        keys["eval_strategy"] = "no"
    lora = [f"`{key}`" for key in keys if key.startswith("lora_")]
    if lora and not keys.get("use_peft"):
        notes.append(f"without `use_peft: true` no LoRA is trained: {', '.join(lora)} without effect")


def _name(path: Path, method: str) -> str:
    """By where the file lies: `zephyr-tiny/dpo`, or `zephyr-7b-beta/dpo_qlora` in the handbook's folders."""
    if path.parent.name == method:
        variant = path.stem.removeprefix("config").strip("_")
        return f"{path.parent.parent.name}/{method}" + (f"_{variant}" if variant else "")
    return f"{path.parent.name}/{path.stem}" if path.stem.partition("_")[0] == method else path.stem


def _build(keys: Keys, given: RecipeKeys) -> Recipe:
    """The recipe; what only its models check becomes an error with the file's name."""
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


LOCAL_ENDINGS = (".jsonl", ".json", ".parquet", ".gguf")
LOCAL_STARTS = ("./", "../", "/", "~")


def resolve_path(name: str, *, folders: Sequence[Path], error: type[UserError]) -> str:
    """The absolute path of a file or folder that exists in one of `folders`, else the name itself.

    Raises:
        UserError: of class `error`, if the name can only be a path, and nothing is there.
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

"""The data keys of a recipe, in every form that recipes use, translated to one `dataset_mixture`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import RecipeError
from trainer.recipe.translate import show

MAIN = ("dataset_mixture", "dataset_mixer", "dataset_name", "datasets")
"""Keys that name the data. A recipe has exactly one of them."""
MORE = ("dataset_splits", "dataset_configs", "dataset_config", "dataset_train_split", "dataset_test_split",
        "test_dataset", "test_split_size")  # fmt: skip
"""Keys that add details: splits, configurations and test data."""
KEYS = (*MAIN, *MORE)
FILES = (".jsonl", ".json", ".parquet")
_MIXTURE_KEYS = {"datasets", "test_datasets", "test_split_size", "seed", "streaming"}
"""The keys of `dataset_mixture`. `streaming` is accepted only if it is false."""
_SOURCE_NAMES = {"path": "id", "name": "config"}
"""TRL's names for keys of a data source, and ours."""


def read(group: Mapping[str, Any], *, source: str, test_source: str) -> tuple[dict[str, Any], list[str]]:
    """Return the full `dataset_mixture` that a recipe's data keys mean, and a note for each form that was translated.

    Args:
        group: the data keys of the recipe.
        source: where the training data are set (a file or the command line), for messages.
        test_source: where `test_dataset` is set.

    Raises:
        RecipeError: no key names the data, or two keys do.
    """
    given = [key for key in MAIN if key in group]
    if len(given) != 1:
        raise RecipeError(
            f"{source}: " + (f"{' and '.join(f'`{key}`' for key in given)} both name" if given else "no key names")
            + " the training data",
            hint="keep only `dataset_mixture`" if given
            else "add `dataset_mixture`: a Hub id, a file, or `datasets: [...]`",
        )  # fmt: skip
    main = given[0]
    mixture = _full(main, group[main], group, source)
    notes = [f"`{main}` is read as `dataset_mixture`"] if main != "dataset_mixture" else []
    notes += _add_splits(mixture, main, group, source)
    if group.get("test_dataset") is not None:
        mixture["test_datasets"] = _tests(group["test_dataset"], test_source)
        mixture.pop("test_split_size", None)
    elif "test_split_size" in group:
        mixture["test_split_size"] = group["test_split_size"]
    return mixture, notes


def is_file(source_id: str) -> bool:
    """Return whether a data source is a single file, which has no splits."""
    return source_id.lower().endswith(FILES)


def _full(main: str, value: Any, group: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the mixture with `datasets` as a list of mappings."""
    if main == "dataset_name":
        config, split = group.get("dataset_config"), group.get("dataset_train_split", "train")
        return {"datasets": [_source({"id": value, "config": config, "split": split}, source)]}
    if main == "dataset_mixture" and isinstance(value, Mapping) and "datasets" in value:
        mixture = {key: item for key, item in value.items() if key != "streaming" or item}
        if unknown := [key for key in mixture if key not in _MIXTURE_KEYS]:
            raise RecipeError(
                f"{source}: unknown key `dataset_mixture.{unknown[0]}` (value {show(mixture[unknown[0]])})",
                hint="its keys are `datasets`, `test_datasets`, `test_split_size` and `seed`",
            )
        if mixture.pop("streaming", None):
            raise RecipeError(
                f"{source}: `dataset_mixture.streaming: true` is not supported: an exact resume needs the whole data set",
                hint="remove `streaming`",
            )
        mixture["datasets"] = _sources(mixture["datasets"], "datasets", source)
        if mixture.get("test_datasets") is not None:
            mixture["test_datasets"] = _tests(mixture["test_datasets"], source)
        else:
            mixture.pop("test_datasets", None)
        return mixture
    return {"datasets": _sources(value, main, source)}


def _sources(value: Any, key: str, source: str) -> list[dict[str, Any]]:
    """Return the list of sources that one id, a mapping of ids to weights, or a list means."""
    if isinstance(value, str):
        return [{"id": value}]
    if isinstance(value, Mapping) and ("id" in value or isinstance(value.get("path"), str)):
        return [_source(value, source)]
    if isinstance(value, Mapping) and value and all(_is_number(item) for item in value.values()):
        return [{"id": name, "weight": weight} for name, weight in value.items()]
    if isinstance(value, list) and value:
        return [{"id": item} if isinstance(item, str) else _source(item, source) for item in value]
    raise RecipeError(
        f"{source}: `{key}: {show(value)}` names no data",
        hint="give a Hub id or a file, a mapping of those to weights, or `datasets:` with a list of `id: ...`",
    )


def _source(entry: Any, source: str) -> dict[str, Any]:
    """Return one source with our names for its keys. TRL's `path: json` with `data_files` becomes the file itself."""
    if not isinstance(entry, Mapping):
        raise RecipeError(
            f"{source}: the data source {show(entry)} is not a mapping", hint="write `id: <Hub id or file>`"
        )
    if "fraction" in entry:
        raise RecipeError(
            f"{source}: `fraction: {show(entry['fraction'])}` of a data source is not supported: it is a share of TRL's mixture",
            hint="use `weight`, the share of the data set's own rows",
        )
    known: dict[str, Any] = {_SOURCE_NAMES.get(key, str(key)): item for key, item in entry.items()}
    if known.get("id") in ("json", "parquet") and isinstance(known.get("data_files"), str):
        known["id"] = known.pop("data_files")
    if isinstance(known.get("columns"), list):
        known["columns"] = {column: column for column in known["columns"]}
    if not isinstance(known.get("id"), str):
        raise RecipeError(
            f"{source}: a data source has no `id`: {show(entry)}", hint="write `id: <Hub id or file>`"
        )
    return {key: item for key, item in known.items() if item is not None}


def _tests(value: Any, source: str) -> list[dict[str, Any]]:
    """Return the test sources. The split is `test` if the source has splits and none is named."""
    sources = _sources(value, "test_datasets", source)
    return [entry if is_file(str(entry["id"])) else {"split": "test", **entry} for entry in sources]


def _add_splits(mixture: dict[str, Any], main: str, group: Mapping[str, Any], source: str) -> list[str]:
    """Apply the old handbook's `dataset_splits` and `dataset_configs`, and TRL's test split, to the sources.

    Return notes for the user.
    """
    configs = group.get("dataset_configs")
    if configs is not None:
        if not isinstance(configs, list) or len(configs) != len(mixture["datasets"]):
            raise RecipeError(
                f"{source}: `dataset_configs: {show(configs)}` must be a list with one entry for each of the "
                f"{len(mixture['datasets'])} data sets",
                hint="add or remove entries",
            )
        mixture["datasets"] = [
            {**entry, "config": config} for entry, config in zip(mixture["datasets"], configs, strict=True)
        ]
    splits = group.get("dataset_splits")
    if splits is None and main == "dataset_mixer":
        splits = ["train", "test"]  # the handbook's default
    if splits is not None:
        return _split(mixture, *_sorted(splits, source))
    if main == "dataset_name" and group.get("dataset_test_split") is not None:
        return _split(mixture, [mixture["datasets"][0]["split"]], [group["dataset_test_split"]])
    return []


def _sorted(splits: Any, source: str) -> tuple[list[str], list[str]]:
    """Return the splits to train on and the splits to evaluate on. A split's name decides which it is."""
    names = [splits] if isinstance(splits, str) else splits
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            f"{source}: `dataset_splits: {show(splits)}` is not a list of splits",
            hint="write `[train, test]`",
        )
    tests = [name for name in names if "test" in name or "valid" in name or "eval" in name]
    trains = [name for name in names if name not in tests]
    if not trains:
        raise RecipeError(
            f"{source}: `dataset_splits: {show(splits)}` has no split to train on",
            hint="add one whose name has none of `test`, `valid` and `eval`",
        )
    return trains, tests


def _split(mixture: dict[str, Any], trains: list[str], tests: list[str]) -> list[str]:
    """Replace each data set by one entry for each split. Return notes for the user.

    A data set that is a single file has no splits, so its entry stays unchanged. All rows of a test split are used, even if
    the data set has a weight.
    """
    whole = [entry for entry in mixture["datasets"] if is_file(str(entry["id"]))]
    parts = [entry for entry in mixture["datasets"] if not is_file(str(entry["id"]))]
    mixture["datasets"] = whole + [{**entry, "split": name} for name in trains for entry in parts]
    mixture["test_datasets"] = [{**entry, "split": name, "weight": 1.0} for name in tests for entry in parts]
    note = f"trained on the split {', '.join(trains)}"
    return [f"{note}; evaluated on all of {', '.join(tests)}" if tests and parts else note]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""The data of a recipe in all the forms that recipes have it in, read as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import RecipeError
from trainer.recipe.translate import show

MAIN = ("dataset_mixture", "dataset_mixer", "dataset_name", "datasets")
"""Keys that say which data; only one of them is given."""
MORE = ("dataset_splits", "dataset_configs", "dataset_config", "dataset_train_split", "dataset_test_split",
        "test_dataset", "test_split_size")  # fmt: skip
"""Keys that say more of it."""
KEYS = (*MAIN, *MORE)
FILES = (".jsonl", ".json", ".parquet")
_OWN = {"datasets", "test_datasets", "test_split_size", "seed", "streaming"}
_SOURCE_NAMES = {"path": "id", "name": "config"}


def read(group: Mapping[str, Any], *, source: str, test_source: str) -> tuple[dict[str, Any], list[str]]:
    """The data keys of a recipe as a `dataset_mixture` in full, and a note for each form translated.

    `source` is where the data to train on is said, `test_source` where `test_dataset` is.

    Raises:
        RecipeError: no data, or two keys that each say which.
    """
    given = [key for key in MAIN if key in group]
    if len(given) != 1:
        raise RecipeError(
            f"{source}: " + (f"{' and '.join(f'`{key}`' for key in given)} both say" if given else "no key says")
            + " what data to train on",
            hint="give `dataset_mixture`" + (" only" if given else ": a Hub id, a file, or `datasets: [...]`"),
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
    """Whether a data source is one file, which has no splits."""
    return source_id.lower().endswith(FILES)


def _full(main: str, value: Any, group: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The mixture with `datasets` as a list of mappings."""
    if main == "dataset_name":
        config, split = group.get("dataset_config"), group.get("dataset_train_split", "train")
        return {"datasets": [_source({"id": value, "config": config, "split": split}, source)]}
    if main == "dataset_mixture" and isinstance(value, Mapping) and "datasets" in value:
        mixture = {key: item for key, item in value.items() if key != "streaming" or item}
        if unknown := [key for key in mixture if key not in _OWN]:
            raise RecipeError(
                f"{source}: unknown key `dataset_mixture.{unknown[0]}` (value {show(mixture[unknown[0]])})",
                hint="it has `datasets`, `test_datasets`, `test_split_size` and `seed`",
            )
        if mixture.pop("streaming", None):
            raise RecipeError(
                f"{source}: `dataset_mixture.streaming: true`: an exact resume needs the whole data set"
            )
        mixture["datasets"] = _sources(mixture["datasets"], "datasets", source)
        if mixture.get("test_datasets") is not None:
            mixture["test_datasets"] = _tests(mixture["test_datasets"], source)
        else:
            mixture.pop("test_datasets", None)
        return mixture
    return {"datasets": _sources(value, main, source)}


def _sources(value: Any, key: str, source: str) -> list[dict[str, Any]]:
    """A list of sources from one id, a mapping of ids to weights, or a list."""
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
        hint="it is a Hub id or a file, a mapping of those to weights, or `datasets:` with a list of `id: ...`",
    )


def _source(entry: Any, source: str) -> dict[str, Any]:
    """One source under our names; TRL's `path: json` with `data_files` is the file itself."""
    if not isinstance(entry, Mapping):
        raise RecipeError(
            f"{source}: the data source {show(entry)} is no mapping", hint="write `id: <Hub id or file>`"
        )
    if "fraction" in entry:
        raise RecipeError(
            f"{source}: `fraction: {show(entry['fraction'])}` of a data source is a share of TRL's mixture",
            hint="say `weight`, the part of the data set's own rows",
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
    """Test sources; the split is `test` where splits there are and none is named."""
    sources = _sources(value, "test_datasets", source)
    return [entry if is_file(str(entry["id"])) else {"split": "test", **entry} for entry in sources]


def _add_splits(mixture: dict[str, Any], main: str, group: Mapping[str, Any], source: str) -> list[str]:
    """What the old handbook's `dataset_splits` and `dataset_configs`, and TRL's test split, say of the sources."""
    configs = group.get("dataset_configs")
    if configs is not None:
        if not isinstance(configs, list) or len(configs) != len(mixture["datasets"]):
            raise RecipeError(
                f"{source}: `dataset_configs: {show(configs)}` is for {len(mixture['datasets'])} data sets",
                hint="give one for each",
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
    """Splits to train on, and splits to evaluate on, by their names."""
    names = [splits] if isinstance(splits, str) else splits
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{source}: `dataset_splits: {show(splits)}` is no list of splits")
    tests = [name for name in names if "test" in name or "valid" in name or "eval" in name]
    trains = [name for name in names if name not in tests]
    if not trains:
        raise RecipeError(f"{source}: `dataset_splits: {show(splits)}` has no split to train on")
    return trains, tests


def _split(mixture: dict[str, Any], trains: list[str], tests: list[str]) -> list[str]:
    """Every source in every split; all rows of those to evaluate on. One file has no splits to choose from."""
    whole = [entry for entry in mixture["datasets"] if is_file(str(entry["id"]))]
    parts = [entry for entry in mixture["datasets"] if not is_file(str(entry["id"]))]
    mixture["datasets"] = whole + [{**entry, "split": name} for name in trains for entry in parts]
    mixture["test_datasets"] = [{**entry, "split": name, "weight": 1.0} for name in tests for entry in parts]
    told = f"trained on the split {', '.join(trains)}"
    return [f"{told}; evaluated on all of {', '.join(tests)}" if tests and parts else told]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

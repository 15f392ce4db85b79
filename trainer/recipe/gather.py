"""The keys of a recipe file and of a command line, under their names of today, as one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from trainer.recipe import mixture, secrets, yaml_file
from trainer.recipe.translate import Keys, show, translate
from trainer.recipe.yaml_file import COMMAND_LINE, Overrides

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


class RecipeKeys(NamedTuple):
    """What a recipe says, and where each key was said."""

    keys: Keys
    said_by_command_line: set[str]
    file: str
    """The file's name in messages."""
    notes: list[str]

    def source(self, key: str) -> str:
        return COMMAND_LINE if key in self.said_by_command_line else self.file


def gather(path: Path, overrides: Overrides) -> RecipeKeys:
    """The file's keys, and over them those of the command line.

    Raises:
        RecipeError: a file that cannot be read, a key that cannot be translated, data in no known form,
            or a secret.
    """
    label = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    written = yaml_file.read(path, label=label)
    secrets.refuse(written, label)
    secrets.refuse(overrides.flat, COMMAND_LINE)
    secrets.refuse({".".join(dotted): value for dotted, value in overrides.dotted.items()}, COMMAND_LINE)
    file = translate(written, source=label)
    line = translate(overrides.flat, source=COMMAND_LINE)
    kept, dropped = _without_what_gives_way(file.keys, line.keys)
    said = {*line.keys, *(path[0] for path in overrides.dotted)}
    given = RecipeKeys({**kept, **line.keys}, said, label, [*file.notes, *line.notes, *dropped])
    _read_mixture(given)
    for dotted, value in overrides.dotted.items():
        yaml_file.set_dotted(given.keys, dotted, copy.deepcopy(value))
    if any(dotted[0] == "dataset_mixture" for dotted in overrides.dotted):
        _read_mixture(given)  # what was put in may be in short, too
    return given


def _without_what_gives_way(file: Keys, line: Keys) -> tuple[Keys, list[str]]:
    """The file's keys less those that another key of the command line stands in for."""
    gone: dict[str, str] = {}
    if line.get("model_name_or_path") is not None and file.get("init") is not None:
        gone["init"] = "model_name_or_path"
    if line.get("init") is not None:
        gone |= {"model_name_or_path": "init", "model_revision": "init"}
    if "global_batch_size" in line:
        gone |= dict.fromkeys(BATCH, "global_batch_size")
    if main := [key for key in mixture.MAIN if key in line]:
        gone |= {key: main[0] for key in mixture.KEYS if key not in line}
    notes = [
        f"the file's `{key}{_value(file[key])}` gives way to `{winner}{_value(line[winner])}` of the {COMMAND_LINE}"
        for key, winner in gone.items()
        if key in file
    ]
    return {key: value for key, value in file.items() if key not in gone}, notes


def _value(value: object) -> str:
    return "" if isinstance(value, dict | list) else f": {show(value)}"


def _read_mixture(given: RecipeKeys) -> None:
    """Put the data keys, in whichever form, into one `dataset_mixture`."""
    group = {key: given.keys.pop(key) for key in mixture.KEYS if key in given.keys}
    main = next((key for key in mixture.MAIN if key in group), "")
    if main in given.said_by_command_line:
        given.said_by_command_line.add("dataset_mixture")
    given.keys["dataset_mixture"], notes = mixture.read(
        group, source=given.source(main), test_source=given.source("test_dataset")
    )
    given.notes.extend(notes)

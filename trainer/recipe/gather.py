"""The keys of a recipe file and of the command line, under today's names, merged. Secrets are refused here."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import RecipeError
from trainer.recipe import mixture, yaml_file
from trainer.recipe.translate import Keys, show, translate
from trainer.recipe.yaml_file import COMMAND_LINE, Overrides

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""TRL's keys for the batch, which `global_batch_size` replaces."""
NOT_SECRET = frozenset({"eos_token", "pad_token", "bos_token", "unk_token", "image_token"})
"""Keys that end in `token` and hold a token of the vocabulary."""
_SECRET_KEY = re.compile(
    r"(^|[_.])(token|auth_token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[oprsu]_|xox[abp]-|AKIA|ASIA)\w{8,}"
)  # tokens of the Hub, OpenAI, GitHub, Slack, Amazon


class RecipeKeys(NamedTuple):
    """The keys of a recipe, and which of them the command line set."""

    keys: Keys
    from_command_line: set[str]
    file: str
    """The file's name in messages."""
    notes: list[str]
    """What the reader changed or ignored: one line each."""

    def source(self, key: str) -> str:
        """Return where a key was set, for messages."""
        return COMMAND_LINE if key in self.from_command_line else self.file


def gather(path: Path, overrides: Overrides) -> RecipeKeys:
    """Read a recipe file, and override its keys with those of the command line.

    Raises:
        RecipeError: the file cannot be read, a key cannot be translated, the data have no known form, or a value is
            a secret.
    """
    label = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    written = yaml_file.read(path, label=label)
    _refuse_secrets(written, label)
    _refuse_secrets(overrides.flat, COMMAND_LINE)
    _refuse_secrets({".".join(dotted): value for dotted, value in overrides.dotted.items()}, COMMAND_LINE)
    file = translate(written, source=label)
    line = translate(overrides.flat, source=COMMAND_LINE)
    remaining, overridden = _without_overridden(file.keys, line.keys)
    from_line = {*line.keys, *(path[0] for path in overrides.dotted)}
    given = RecipeKeys({**remaining, **line.keys}, from_line, label, [*file.notes, *line.notes, *overridden])
    _read_mixture(given)
    # Dotted keys address the full form of the mixture, so they are applied after it is read.
    for dotted, value in overrides.dotted.items():
        yaml_file.set_dotted(given.keys, dotted, copy.deepcopy(value))
    if any(dotted[0] == "dataset_mixture" for dotted in overrides.dotted):
        _read_mixture(given)  # the new values may be in a short form, too
    return given


def is_secret(key: str, value: object) -> bool:
    """Return whether a value looks like a secret, by its key's name or by its own form."""
    is_named_so = (
        bool(_SECRET_KEY.search(key))
        and key not in NOT_SECRET
        and value is not None
        and not isinstance(value, bool)
    )
    return is_named_so or (isinstance(value, str) and bool(_SECRET_VALUE.search(value)))


def _refuse_secrets(keys: Mapping[str, Any], source: str) -> None:
    """Raise `RecipeError` if a value, at any depth, looks like a secret. The message does not repeat the value."""
    for key, value in keys.items():
        if is_secret(key, value):
            raise RecipeError(
                f"{source}: `{key}` holds a secret, and recipes are printed, stored in the bucket and shown in reports",
                hint="put it in the environment: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY …",
            )
        if isinstance(value, Mapping):
            _refuse_secrets(value, source)
        elif isinstance(value, list | tuple):
            _refuse_secrets({f"{key}[{number}]": item for number, item in enumerate(value)}, source)


def _without_overridden(file: Keys, line: Keys) -> tuple[Keys, list[str]]:
    """Return the file's keys without those that another key of the command line replaces, and a note for each."""
    replaced: dict[str, str] = {}
    if line.get("model_name_or_path") is not None and file.get("init") is not None:
        replaced["init"] = "model_name_or_path"
    if line.get("init") is not None:
        replaced |= {"model_name_or_path": "init", "model_revision": "init"}
    if "global_batch_size" in line:
        replaced |= dict.fromkeys(BATCH, "global_batch_size")
    if main := [key for key in mixture.MAIN if key in line]:
        replaced |= {key: main[0] for key in mixture.KEYS if key not in line}
    notes = [
        f"`{winner}{_assigned(line[winner])}` on the {COMMAND_LINE} overrides `{key}{_assigned(file[key])}`"
        for key, winner in replaced.items()
        if key in file
    ]
    return {key: value for key, value in file.items() if key not in replaced}, notes


def _assigned(value: object) -> str:
    """Return the text `: value` that follows a key in a message. Empty for a mapping or list, which may be too long."""
    return "" if isinstance(value, dict | list) else f": {show(value)}"


def _read_mixture(given: RecipeKeys) -> None:
    """Replace all data keys, in whichever form, by one `dataset_mixture`."""
    group = {key: given.keys.pop(key) for key in mixture.KEYS if key in given.keys}
    main = next((key for key in mixture.MAIN if key in group), "")
    if main in given.from_command_line:
        given.from_command_line.add("dataset_mixture")
    given.keys["dataset_mixture"], notes = mixture.read(
        group, source=given.source(main), test_source=given.source("test_dataset")
    )
    given.notes.extend(notes)

"""Writing one setting: the key changes, and the rest of the file stays."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from launcher.settings import SettingsError, load, with_key, write_setting


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 'image = "new"\n'),
        ("# mine\ncheckpoints = 'runs'\n", "# mine\ncheckpoints = 'runs'\nimage = \"new\"\n"),
        ('image = "old"\nbudget_usd = 5\n', 'image = "new"\nbudget_usd = 5\n'),
        ("infra = [\n  'gcp',\n]\n", "infra = [\n  'gcp',\n]\nimage = \"new\"\n"),
    ],
)
def test_one_key_is_written(before: str, after: str) -> None:
    """Comments, order and other keys stay; an existing key is replaced in its line."""
    assert with_key(before, "image", "new") == after


def test_a_value_of_any_form_is_read_back(tmp_path: Path) -> None:
    """The value that was written is the one that `submit` reads."""
    environ = {"AEOLUS_CONFIG": str(tmp_path / "new" / "config.toml")}
    for image in ("ghcr.io/me/aeolus-trainer:1", 'a"b\\c'):
        path = write_setting(environ, "image", image)
        assert tomllib.loads(path.read_text())["image"] == image
        assert load(environ).image == image


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error names the key and the file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot write image"):
        write_setting({"AEOLUS_CONFIG": str(tmp_path / "file" / "config.toml")}, "image", "x")

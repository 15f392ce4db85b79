"""The settings: the file, the environment, writing one key, and the errors."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from launcher.settings import Settings, SettingsError, load, settings_file, with_key, write_setting


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_the_file_is_read(config: Path) -> None:
    """The keys of the TOML file are the settings."""
    config.write_text('checkpoints = "gs://bucket/runs"\ntrainer_python = "/opt/python"\n')
    expected = Settings(checkpoints="gs://bucket/runs", trainer_python=Path("/opt/python"))
    assert load({"AEOLUS_CONFIG": str(config)}) == expected


def test_the_environment_overrides_the_file(config: Path) -> None:
    """A variable overrides the file's key; an empty variable does not."""
    config.write_text('checkpoints = "gs://bucket/runs"\n')
    environ = {"AEOLUS_CONFIG": str(config), "AEOLUS_CHECKPOINTS": "s3://other", "AEOLUS_TRAINER_PYTHON": ""}
    assert load(environ) == Settings(checkpoints="s3://other")


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file is optional: by default runs go to a folder in the working directory."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load({}) == Settings(checkpoints="runs", trainer_python=None)


def test_a_named_file_must_be_there(config: Path) -> None:
    """A missing file that $AEOLUS_CONFIG names is an error; the defaults do not apply."""
    with pytest.raises(SettingsError, match=r"the settings file .* does not exist"):
        load({"AEOLUS_CONFIG": str(config)})


def test_an_unknown_key_is_an_error_that_names_the_nearest(config: Path) -> None:
    """A misspelt key is an error with the nearest known key."""
    config.write_text('checkpoint = "gs://bucket/runs"\n')
    with pytest.raises(SettingsError, match="checkpoint: unknown key; did you mean `checkpoints`"):
        load({"AEOLUS_CONFIG": str(config)})


def test_broken_toml_is_an_error_that_names_the_file(config: Path) -> None:
    """Invalid TOML is an error with the file's path."""
    config.write_text("checkpoints = gs://\n")
    with pytest.raises(SettingsError, match=str(config)):
        load({"AEOLUS_CONFIG": str(config)})


def test_the_named_file_may_be_in_the_home_folder() -> None:
    """A tilde is expanded to the user's home."""
    assert settings_file({"AEOLUS_CONFIG": "~/a.toml"}) == Path.home() / "a.toml"


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

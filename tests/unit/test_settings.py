"""The settings: the file, the environment, and the errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.settings import Settings, SettingsError, load, settings_file


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

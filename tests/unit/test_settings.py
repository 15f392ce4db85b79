"""The site's settings: file, environment, and what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.settings import Settings, SettingsError, load, settings_file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_the_file_is_read(config: Path) -> None:
    """Keys of the TOML file are the settings."""
    config.write_text('checkpoints = "gs://bucket/runs"\ntrainer_python = "/opt/python"\n')
    expected = Settings(checkpoints="gs://bucket/runs", trainer_python=Path("/opt/python"))
    assert load({"AEOLUS_CONFIG": str(config)}) == expected


def test_the_environment_overrides_the_file(config: Path) -> None:
    """A variable wins over the file's key; an empty variable does not."""
    config.write_text('checkpoints = "gs://bucket/runs"\n')
    environ = {"AEOLUS_CONFIG": str(config), "AEOLUS_CHECKPOINTS": "s3://other", "AEOLUS_TRAINER_PYTHON": ""}
    assert load(environ) == Settings(checkpoints="s3://other")


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody needs a settings file: runs go to a folder where the user stands."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load({}) == Settings(checkpoints="runs", trainer_python=None)


def test_a_named_file_must_be_there(config: Path) -> None:
    """A settings file that was asked for and is missing is an error, not the defaults."""
    with pytest.raises(SettingsError, match=r"the settings file .* does not exist"):
        load({"AEOLUS_CONFIG": str(config)})


def test_an_unknown_key_is_an_error_that_names_the_nearest(config: Path) -> None:
    """A misspelt key never goes unnoticed."""
    config.write_text('checkpoint = "gs://bucket/runs"\n')
    with pytest.raises(SettingsError, match="checkpoint: unknown key; did you mean `checkpoints`"):
        load({"AEOLUS_CONFIG": str(config)})


def test_broken_toml_is_an_error_that_names_the_file(config: Path) -> None:
    """A file that is not TOML is the user's to mend."""
    config.write_text("checkpoints = gs://\n")
    with pytest.raises(SettingsError, match=str(config)):
        load({"AEOLUS_CONFIG": str(config)})


def test_the_named_file_may_be_in_the_home_folder() -> None:
    """A tilde means the user's home."""
    assert settings_file({"AEOLUS_CONFIG": "~/a.toml"}) == Path.home() / "a.toml"

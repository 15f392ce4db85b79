"""The committed list of TRL's keys is that of the installed TRL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.recipe import load, names
from trainer.recipe.fields import PATH, of
from trainer.recipe.model import BOOKKEEPING

FIXTURES = sorted(Path(__file__).resolve().parents[1].glob("fixtures/handbook_*.yaml"))

pytest.importorskip("trl", reason="TRL is not installed; this runs in the trainer environment")


def test_the_field_list_equals_the_installed_trls() -> None:
    """A recipe is checked on the laptop against what the node will take.

    After an upgrade: `python -m trainer.recipe.generate_fields`.
    """
    from trainer.recipe.generate_fields import text

    assert json.loads(PATH.read_text()) == json.loads(text())
    assert PATH.read_text() == text()


def test_the_list_is_of_the_pinned_release() -> None:
    """The versions are those that the trainer environment has."""
    from importlib.metadata import version

    versions = json.loads(PATH.read_text())["versions"]
    assert versions == {name: version(name) for name in versions}


def test_bookkeeping_keys_are_keys_of_trl() -> None:
    """A key that TRL renamed would come back into the digest unseen."""
    assert {*of("sft"), *of("dpo")} >= BOOKKEEPING


@pytest.mark.parametrize("source", [*FIXTURES, *names()], ids=lambda source: Path(source).stem)
def test_trl_takes_what_the_laptop_let_through(source: str | Path, tmp_path: Path) -> None:
    """A recipe that loads is never refused on the node for its keys or types."""
    from trl import DPOConfig, ModelConfig, SFTConfig

    recipe = load(source).recipe
    config = (DPOConfig if recipe.method == "dpo" else SFTConfig)(
        output_dir=str(tmp_path), use_cpu=True, **{"bf16": False} | recipe.trainer_args
    )
    assert config.learning_rate == recipe.trainer_args["learning_rate"]
    assert ModelConfig(**recipe.model_args).dtype == recipe.model_args["dtype"]

"""What a recipe's header promises is what `launcher plan` says."""

from __future__ import annotations

import pytest

from launcher.plan.recipe_headers import LINE, predict, predicted_recipes
from trainer.recipe import load
from trainer.recipe.yaml_file import RECIPES


@pytest.mark.parametrize("name", predicted_recipes())
def test_a_header_says_what_the_plan_says(name: str) -> None:
    """Mended by `python -m launcher.plan.recipe_headers` when prices or estimates have changed."""
    found = LINE.findall((RECIPES / f"{name}.yaml").read_text())
    assert found == [predict(load(name).recipe)]

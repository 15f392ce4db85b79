"""The predictions in the recipes' headers equal those of `launcher plan`."""

from __future__ import annotations

import pytest

from launcher.plan.recipe_headers import LINE, predict, predicted_recipes
from trainer.recipe import load
from trainer.recipe.yaml_file import RECIPES


@pytest.mark.parametrize("name", predicted_recipes())
def test_a_header_equals_the_plan(name: str) -> None:
    """`python -m launcher.plan.recipe_headers` updates them after a change of prices or estimates."""
    found = LINE.findall((RECIPES / f"{name}.yaml").read_text())
    assert found == [predict(load(name).recipe)]

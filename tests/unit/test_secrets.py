"""A secret in a recipe is refused, and no message repeats it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import RecipeError
from trainer.recipe import load

SECRET = "hf_abcdefghijklmnop"
RECIPE = "method: sft\ninit: tiny\ndataset_mixture: generated:chats\nglobal_batch_size: 8\n"


@pytest.mark.parametrize(
    "line",
    [
        f"hub_token: {SECRET}",
        "HF_TOKEN: anything",
        f"model_init_kwargs: {{token: {SECRET}}}",
        f"run_name: my {SECRET} run",
        "wandb_api_key: 0123",
    ],
)
def test_a_secret_in_the_file_is_refused_without_repeating_it(tmp_path: Path, line: str) -> None:
    """The message names the key and what to do, but not the value, because a log may be public."""
    path = tmp_path / "sft.yaml"
    path.write_text(f"{RECIPE}{line}\n")
    with pytest.raises(RecipeError, match="holds a secret") as caught:
        load(path)
    assert line.rpartition(": ")[2].strip("{}") not in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)


@pytest.mark.parametrize("override", [f"HF_TOKEN={SECRET}", f"model_init_kwargs.token={SECRET}"])
def test_a_secret_on_the_command_line_is_refused(override: str) -> None:
    """Command lines are checked like files."""
    with pytest.raises(RecipeError, match=r"command line: .* holds a secret") as caught:
        load("zephyr-tiny/sft", [override])
    assert SECRET not in str(caught.value)


def test_tokens_of_the_vocabulary_are_not_secrets() -> None:
    """`pad_token`, and the null `hub_token` of an old recipe, are accepted."""
    loaded = load("zephyr-tiny/sft", ["pad_token=</s>", "hub_token=null"])
    assert loaded.recipe.trainer_args["pad_token"] == "</s>"

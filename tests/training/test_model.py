"""The base that a run begins with: tiny models, folders, adapters, and what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.training.jobs import LORA, SMALL, Trained, make_job, without_test_data
from trainer.errors import ModelError
from trainer.job import Job
from trainer.worker import failures, model, model_source, sources
from trainer.worker.chat_template import load_tokenizer


def located(job: Job) -> model_source.Base:
    return model_source.locate(job, sources.read(job.recipe).train)


def digest(job: Job) -> str:
    return model.digest(model.load(located(job), job.recipe, job.fit), job.recipe)


def test_a_tiny_model_is_the_same_at_every_attempt(tmp_path: Path) -> None:
    """Same rows and seed: same weights and tokenizer; another seed: other weights."""
    jobs = [
        make_job(tmp_path / str(number), "zephyr-tiny/sft", *SMALL, f"seed={seed}")
        for number, seed in enumerate((1, 1, 2))
    ]
    first, again, other = (digest(job) for job in jobs)
    assert first == again != other
    tokenizers = {(job.work / "model" / "tokenizer.json").read_bytes() for job in jobs}
    assert len(tokenizers) == 1


def test_making_a_tiny_model_draws_no_random_numbers(tmp_path: Path) -> None:
    """An attempt that makes the model and a rank that finds it made go on with the same randomness."""
    import torch

    job = make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL)
    before = torch.random.get_rng_state()
    located(job)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_default_tiny_model_has_a_million_parameters(tmp_path: Path) -> None:
    """Its defaults stay within what two CPU cores train in half a minute."""
    job = make_job(tmp_path / "job", "zephyr-tiny/sft")
    policy = model.load(located(job), job.recipe, job.fit)
    assert 0.5e6 < sum(weight.numel() for weight in policy.parameters()) < 5e6
    embeddings = 2 * (job.recipe.tiny.vocab_size - policy.config.vocab_size) * job.recipe.tiny.hidden_size
    assert 1e6 < sum(weight.numel() for weight in policy.parameters()) + embeddings < 5e6


def test_only_training_rows_teach_the_tokenizer(tmp_path: Path) -> None:
    """The test set leaves no mark on the model: without it the tokenizer is the same."""
    jobs = [
        make_job(tmp_path / "with", "zephyr-tiny/sft", *SMALL),
        without_test_data(make_job(tmp_path / "without", "zephyr-tiny/sft", *SMALL)),
    ]
    tokenizers = {(Path(located(job).path) / "tokenizer.json").read_bytes() for job in jobs}
    assert len(tokenizers) == 1


def named(tmp_path: Path, path: str) -> Job:
    """A job of a model by its name; the recipe's own check of paths was on another machine."""
    job = make_job(tmp_path / "job", "zephyr-tiny/sft", "init=null", "model_name_or_path=org/model")
    return job.model_copy(update={"model": path})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no model folder"),
        ("empty", "has no config.json"),
        ("absent.gguf", "there is no file"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path: Path, name: str, message: str) -> None:
    """A path that looks like one is never asked of the Hub."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message):
        located(named(tmp_path, str(tmp_path / name)))


def test_damaged_weights_are_the_users_to_mend(tmp_path: Path, small: Callable[..., Trained]) -> None:
    """A cut file is told with the folder's name, not as a traceback."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in small("zephyr-tiny/sft").final.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    job = named(tmp_path, str(broken))
    with pytest.raises(ModelError, match="broken cannot be loaded") as error:
        model.load(located(job), job.recipe, job.fit)
    assert "damaged" in str(error.value)


class GatedRepoError(OSError):
    """As the Hub's client names it."""


def test_a_gated_model_asks_for_a_token() -> None:
    """The way out of a refusal is in the message."""
    error = OSError("You are trying to access a gated repo.")
    error.__cause__ = GatedRepoError("401 Client Error")
    assert "HF_TOKEN" in str(failures.explained("org/model", error))


def test_the_error_for_an_unreachable_hub_names_both_places() -> None:
    """Neither here nor there."""
    assert "Hub that this machine can reach" in str(
        failures.explained("org/model", OSError("We couldn't connect"))
    )


def test_the_recipes_template_comes_before_the_tokenizers(
    tmp_path: Path, small: Callable[..., Trained]
) -> None:
    """The recipe's, else the tokenizer's own; a tiny model has Zephyr's."""
    final = small("zephyr-tiny/sft").final
    tokenizer = load_tokenizer(str(final), named(tmp_path, str(final)).recipe)
    assert "<|assistant|>" in tokenizer.chat_template
    job = make_job(tmp_path / "other", "zephyr-tiny/sft", "chat_template=x")
    assert load_tokenizer(str(final), job.recipe).chat_template == "x"


def test_an_adapter_as_the_model_is_merged(tmp_path: Path, small: Callable[..., Trained]) -> None:
    """A model that is only an adapter becomes a whole one, which the policy and the reference both begin with."""
    base = small("zephyr-tiny/sft").final
    adapter = small("zephyr-tiny/dpo", "init=null", f"model_name_or_path={base}", *LORA).final
    job = named(tmp_path, str(adapter))
    found = located(job)
    assert found.name is None
    merged = model.load(found, job.recipe, job.fit)
    plain = model.load(model_source.Base(str(base), None), job.recipe, job.fit)
    assert weights(merged).keys() == weights(plain).keys()
    changed = {name for name, weight in weights(merged).items() if not weight.equal(weights(plain)[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def weights(policy: Any) -> dict[str, Any]:
    return dict(policy.state_dict())


def test_a_quantised_base_is_loaded_in_four_bits(tmp_path: Path) -> None:
    """QLoRA's base: 4-bit NormalFloat, its constants quantised too."""
    quantised = ("load_in_4bit=true", "use_bnb_nested_quant=true")
    job = make_job(tmp_path / "job", "zephyr-tiny/sft", *SMALL, *LORA, *quantised)
    policy = model.load(located(job), job.recipe, job.fit)
    settings = policy.config.quantization_config
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
    assert policy.model.layers[0].mlp.up_proj.weight.dtype.itemsize == 1


def test_flash_attention_gives_way_where_it_cannot_run(tmp_path: Path) -> None:
    """On a CPU the recipe's wish becomes SDPA; any other wish is kept."""
    job = make_job(tmp_path / "job", "zephyr-tiny/sft", "attn_implementation=flash_attention_2")
    assert model.attention(job.recipe, job.fit) == "sdpa"
    other = make_job(tmp_path / "other", "zephyr-tiny/sft", "attn_implementation=eager")
    assert model.attention(other.recipe, other.fit) == "eager"


def test_what_is_made_once_is_whole_or_not_there(tmp_path: Path) -> None:
    """A failure leaves no folder, and a success is not made again."""

    def fail(into: Path) -> None:
        (into / "part").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        model_source.make_once(tmp_path / "made", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]
    model_source.make_once(tmp_path / "made", lambda into: (into / "all").touch())
    model_source.make_once(tmp_path / "made", fail)
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["all"]


def test_of_many_ranks_one_makes_it(tmp_path: Path) -> None:
    """The others wait for it: eight that merge an adapter at once would hold eight models."""
    made: list[Path] = []

    def slow(into: Path) -> None:
        made.append(into)
        time.sleep(0.2)
        (into / "model").touch()

    with ThreadPoolExecutor(4) as ranks:
        folders = list(ranks.map(lambda _: model_source.make_once(tmp_path / "made", slow), range(4)))
    assert len(made) == 1
    assert all((folder / "model").is_file() for folder in folders)

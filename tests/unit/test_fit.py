"""The fit: a split of the global batch over a shape, exact on every shape that it accepts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import NoFit
from trainer.fit import LARGEST_MICRO_BATCH, Fit, fit
from trainer.hardware import Shape
from trainer.recipe import DataSource, Mixture, Recipe

sizes = st.integers(1, 512)


def recipe(batch: int, micro: int | None = None) -> Recipe:
    return Recipe(
        name="a",
        method="sft",
        init="tiny",
        dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
        global_batch_size=batch,
        micro_batch_size=micro,
    )


def shape(count: int = 0, cores: int = 8) -> Shape:
    return Shape(
        accelerator="A100-80GB" if count else None,
        count=count,
        memory_gib=80.0 if count else None,
        cores=cores,
        host_memory_gib=64.0,
        node="a",
    )


def test_a_cpu_takes_the_whole_batch_with_all_its_cores() -> None:
    """Without a GPU there is one process."""
    assert fit(recipe(12), shape(cores=2)) == Fit(
        processes=1,
        micro_batch=6,
        accumulation=2,
        threads=2,
        use_cpu=True,
        reasons=(
            "1 process",
            "micro batch 6: the largest up to 8 that divides a process's 12",
            "accumulation 2: 1 x 6 x 2 = 12",
            "2 threads each: 2 cores for 1",
        ),
    )


def test_gpus_share_the_batch_and_the_cores() -> None:
    """Each GPU has a process, and each process its part."""
    planned = fit(recipe(128), shape(8, cores=96))
    assert (planned.processes, planned.micro_batch, planned.accumulation, planned.threads) == (8, 8, 2, 12)
    assert not planned.use_cpu


@given(batch=sizes, count=st.integers(0, 16), cores=st.integers(1, 256))
def test_the_global_batch_is_exact_on_any_shape_that_fits(batch: int, count: int, cores: int) -> None:
    """A shape changes the split and never the batch; a refusal is for uneven shares only."""
    try:
        planned = fit(recipe(batch), shape(count, cores))
    except NoFit:
        assert batch % count
        return
    assert planned.processes * planned.micro_batch * planned.accumulation == batch
    assert planned.processes == max(count, 1)
    assert planned.micro_batch <= LARGEST_MICRO_BATCH
    assert planned.threads >= 1


@given(micro=st.integers(1, 64), parts=st.integers(1, 16), count=st.sampled_from([0, 1, 2, 4, 8]))
def test_a_wish_for_the_micro_batch_is_never_exceeded(micro: int, parts: int, count: int) -> None:
    """It is what memory holds; with more GPUs a process may have less to do."""
    batch = micro * parts * max(count, 1)
    planned = fit(recipe(batch, micro), shape(count))
    assert planned.micro_batch == micro
    assert planned.processes * planned.micro_batch * planned.accumulation == batch


def test_a_wish_too_large_for_a_share_gives_way() -> None:
    """The same recipe runs on one GPU and on eight."""
    planned = fit(recipe(16, 16), shape(8))
    assert (planned.micro_batch, planned.accumulation) == (2, 1)
    assert "the recipe's 16 does not divide a process's 2" in planned.reasons[1]


def test_an_uneven_share_names_the_nearest_that_works() -> None:
    """The way out is more or fewer GPUs; another batch is another model."""
    with pytest.raises(NoFit) as caught:
        fit(recipe(128), shape(3))
    assert caught.value.message == (
        "recipe a has global_batch_size 128, which 3 GPUs (A100-80GB:3) cannot share evenly"
    )
    assert caught.value.hint == (
        "take 2 or 4 GPUs, or `global_batch_size=126` or `global_batch_size=129`, which trains another model"
    )


def test_more_gpus_than_samples_do_not_fit() -> None:
    """A GPU without a sample has nothing to do."""
    with pytest.raises(NoFit, match="take 4 GPUs, or `global_batch_size=8`"):
        fit(recipe(4), shape(8))

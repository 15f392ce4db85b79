"""The choice among layouts that fit: the estimate's seconds of a step, and what it cannot tell apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_fit import SMALL, ZEPHYR, architecture, dpo, qlora, recipe, shape, with_memory
from trainer.errors import NoFit
from trainer.estimate import step_s, usual_workload
from trainer.fit import Fit, fit
from trainer.fit.candidates import ENGINE_WORTH, WORTH, TimedLayout, rank
from trainer.hardware import Shape
from trainer.memory import Layout, predict_usage
from trainer.recipe import DataSource, Mixture, Recipe


def layouts(wanted: Recipe, on: Shape, planned: Fit) -> Iterator[Layout]:
    """All without offload that a shape could have, whatever they take."""
    whole = "ddp" if on.gpus > 1 else "single"
    cut = ["zero2", "zero3"] if on.gpus > 1 else []
    for engine in (whole, *cut):
        for checkpointing in (False, True):
            for micro in (1, 2, 4, 8, 16, 32):
                if wanted.global_batch_size % (micro * on.gpus) == 0:
                    changes = {
                        "engine": engine,
                        "activation_checkpointing": checkpointing,
                        "micro_batch": micro,
                    }
                    yield Layout(**{**planned.model_dump(include=set(Layout.model_fields)), **changes})


def timed(wanted: Recipe, on: Shape, layout: Layout, model: str = ZEPHYR) -> TimedLayout:
    return TimedLayout(layout, step_s(wanted, architecture(model), layout, on, usual_workload(wanted)))


@settings(deadline=None, max_examples=40)
@given(
    model=st.sampled_from(["HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-1.5B", ZEPHYR]),
    count=st.sampled_from([1, 4, 8]),
    nodes=st.sampled_from([1, 2]),
    gpu_gib=st.floats(4, 200),
    length=st.sampled_from([256, 1024, 4096]),
)
def test_nothing_that_fits_comes_before_what_is_chosen(
    model: str, count: int, nodes: int, gpu_gib: float, length: int
) -> None:
    """What is left untried, and untimed, could not have been chosen."""
    wanted = dpo(max_length=length, offload="none")
    on = with_memory(count, gpu_gib, 2000.0).model_copy(update={"nodes": nodes})
    try:
        planned = fit(wanted, on, architecture(model))
    except NoFit:
        return
    best = rank(timed(wanted, on, planned, model))
    for other in layouts(wanted, on, planned):
        on_gpu, _ = predict_usage(wanted, architecture(model), other, has_bf16=True)
        if on_gpu.gib <= 0.99 * gpu_gib * 79.14 / 80:
            assert best <= rank(timed(wanted, on, other, model))


def test_a_doubled_micro_batch_has_to_be_worth_its_memory() -> None:
    """What the estimate cannot tell apart is decided for less memory and for the simpler engine."""
    small = Layout(
        processes=8, micro_batch=2, engine="zero2", attention="sdpa", activation_checkpointing=False,
        reference="none",
    )  # fmt: skip
    large = small.model_copy(update={"micro_batch": 4})
    assert rank(TimedLayout(small, 1.0)) < rank(TimedLayout(large, 1.001 / WORTH))
    assert rank(TimedLayout(small, 1.0)) > rank(TimedLayout(large, 0.999 / WORTH))
    whole, limit = small.model_copy(update={"engine": "ddp"}), 1 / ENGINE_WORTH["zero2"]
    assert rank(TimedLayout(whole, 1.0)) < rank(TimedLayout(small, 1.001 * limit))
    assert rank(TimedLayout(whole, 1.0)) > rank(TimedLayout(small, 0.999 * limit))
    assert rank(TimedLayout(small, 1.0)) < rank(
        TimedLayout(small.model_copy(update={"engine": "zero3"}), 0.96)
    )


def test_an_offload_is_never_taken_for_its_speed() -> None:
    """However fast the estimate believes it to be."""
    planned = fit(dpo(), shape(8, 96), architecture())
    offloaded = planned.model_copy(update={"offload_optimizer": True})
    assert rank(TimedLayout(planned, 9.0)) < rank(TimedLayout(offloaded, 1.0))


def test_a_slow_network_makes_fewer_and_larger_micro_batches() -> None:
    """ZeRO sends the gradients of each micro batch: between nodes recomputation costs less than that."""
    one, two = (fit(dpo(batch=128), shape(8, 96, nodes=nodes), architecture()) for nodes in (1, 2))
    assert (one.activation_checkpointing, two.activation_checkpointing) == (False, True)
    assert two.micro_batch > one.micro_batch


def test_the_reasons_say_what_the_others_would_take() -> None:
    """The chosen layout has fewer seconds than the alternatives in its reason, unless `WORTH` decides."""
    planned = fit(dpo(), shape(8, 96), architecture())
    micro = next(reason for reason in planned.reasons if reason.startswith("micro batch"))
    assert "predicted, " in micro
    best, *others = map(float, re.findall(r"([\d.]+) s", micro))
    assert others
    assert best < min(others)
    assert best == pytest.approx(timed(dpo(), shape(8, 96), planned).seconds, rel=0.01)


def test_a_faster_engine_than_the_simplest_says_by_how_much() -> None:
    """Whole replicas of a small model fit, and send twice the bytes between nodes."""
    planned = fit(recipe(128), shape(8, 96, nodes=2), SMALL)
    assert planned.engine == "zero2"
    reason = next(reason for reason in planned.reasons if reason.startswith("ZeRO-2: "))
    taken = re.search(r"DDP takes ([\d.]+) s per step", reason)
    assert taken
    assert float(taken[1]) > timed(recipe(128), shape(8, 96, nodes=2), planned, SMALL.name).seconds


def test_a_micro_batch_that_is_named_is_not_made_smaller_for_speed() -> None:
    """A `micro_batch_size` of the recipe is used, although the fit alone would choose a smaller one."""
    on = shape(1, 8, "A100-80GB", 200.0)
    wanted = qlora().model_copy(update={"micro_batch_size": 2})
    assert fit(wanted, on, architecture()).micro_batch == 2


def test_a_gpu_outside_the_table_has_a_fit() -> None:
    """A GPU of unknown speed still has a fit."""
    unknown = shape(8, 96).model_copy(update={"accelerator": "B999", "memory_gib": 80.0})
    assert fit(dpo(), unknown, architecture()).engine == "zero2"


def test_whether_the_data_lie_here_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that has counted the rows and a node that has not read them choose the same fit."""
    monkeypatch.chdir(tmp_path)
    wanted = dpo().model_copy(update={"dataset_mixture": Mixture(datasets=(DataSource(id="pairs.jsonl"),))})
    before = fit(wanted, shape(8, 96), architecture())
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n' * 500)
    assert fit(wanted, shape(8, 96), architecture()) == before
    assert usual_workload(wanted).tokens == 2 * 1024

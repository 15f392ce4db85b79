"""Properties of every fit, tested with generated recipes, models and memory sizes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_fit import SMALL, ZEPHYR, architecture, dpo, with_memory
from trainer.errors import NoFit
from trainer.estimate import step_s, usual_workload
from trainer.fit import Fit, fit
from trainer.fit.candidates import TimedLayout, rank
from trainer.recipe import Recipe

MODELS = ["HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-1.5B", ZEPHYR]
recipes = st.builds(
    lambda lora, checkpointing, offload, optim, length: dpo(
        optim=optim,
        max_length=length,
        offload=offload,
        **({"use_peft": True, "lora_r": 16} if lora else {}),
        **({} if checkpointing is None else {"gradient_checkpointing": checkpointing}),
    ),
    st.booleans(),
    st.sampled_from([None, None, True, False]),
    st.sampled_from([None, None, "none"]),
    st.sampled_from(["adamw_torch_fused", "rmsprop", "paged_adamw_8bit"]),
    st.sampled_from([256, 1024, 4096]),
)


def on_a100(wanted: Recipe, planned: Fit, model: str) -> TimedLayout:
    on = with_memory(planned.processes, 80.0, 1000.0)
    return TimedLayout(planned, step_s(wanted, architecture(model), planned, on, usual_workload(wanted)))


@settings(deadline=None)
@given(
    wanted=recipes,
    model=st.sampled_from(MODELS),
    count=st.sampled_from([1, 2, 4, 8]),
    gpu_gib=st.floats(4, 200),
    host_gib=st.floats(32, 2000),
    more=st.tuples(st.floats(0, 100), st.floats(0, 1000)),
)
def test_more_memory_never_makes_it_worse(
    wanted: Recipe, model: str, count: int, gpu_gib: float, host_gib: float, more: tuple[float, float]
) -> None:
    """What fitted still fits, and is at least as fast by our own ranking."""
    try:
        less = fit(wanted, with_memory(count, gpu_gib, host_gib), architecture(model))
    except NoFit:
        return
    larger = fit(wanted, with_memory(count, gpu_gib + more[0], host_gib + more[1]), architecture(model))
    assert rank(on_a100(wanted, larger, model)) <= rank(on_a100(wanted, less, model))
    assert (
        larger.offload_optimizer + larger.offload_parameters
        <= less.offload_optimizer + less.offload_parameters
    )


@settings(deadline=None)
@given(
    wanted=recipes,
    model=st.sampled_from(MODELS),
    count=st.sampled_from([1, 2, 4, 8]),
    gpu_gib=st.floats(4, 200),
)
def test_what_fits_is_within_the_memory_that_is_there(
    wanted: Recipe, model: str, count: int, gpu_gib: float
) -> None:
    """Each GPU's and each host's sum, with the share that is left alone."""
    try:
        planned = fit(wanted, with_memory(count, gpu_gib, 512.0), architecture(model))
    except NoFit:
        return
    assert planned.gpu.gib <= gpu_gib
    assert planned.host.gib <= 512.0 * 0.9


@settings(deadline=None)
@given(wanted=recipes, counts=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])))
def test_a_shape_changes_no_hyperparameter(wanted: Recipe, counts: tuple[int, int]) -> None:
    """Two shapes' fits differ in the split and the engine; the batch of a step is the recipe's on both."""
    one, other = (fit(wanted, with_memory(count, 190.0, 2000.0), SMALL) for count in counts)
    assert not set(Fit.model_fields) & set(wanted.trainer_args) - {"activation_checkpointing"}
    for planned in (one, other):
        assert planned.processes * planned.micro_batch * planned.accumulation == wanted.global_batch_size
        assert planned.reference == one.reference

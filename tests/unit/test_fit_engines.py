"""The engine that a recipe names is the one that the fit takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_fit import architecture, dpo, recipe, shape
from trainer.errors import NoFit
from trainer.fit import fit
from trainer.recipe import Recipe


def named(engine: str, **keys: Any) -> Recipe:
    return dpo(**keys).model_copy(update={"engine": engine})


def test_an_engine_is_had_on_request() -> None:
    """FSDP2 shards what ZeRO-3 shards. The reason names the recipe's key and the engine."""
    planned = fit(named("fsdp2"), shape(8, 96), architecture())
    assert (planned.engine, planned.offload_optimizer, planned.parameter_shards) == ("fsdp2", False, 8)
    assert planned.words().startswith("FSDP2, micro batch")
    assert "FSDP2: set by the recipe (`engine: fsdp2`)" in planned.reasons


def test_silence_takes_zero_3_where_parameters_are_cut() -> None:
    """Without `engine` ZeRO-3 is the default, because no measurement favours FSDP2."""
    second = fit(dpo(precompute_ref_log_probs=False), shape(8, 96, "A100", 680.0), architecture())
    assert second.engine == "zero3"


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [("ddp", 1, "single"), ("fsdp2", 1, "fsdp2"), ("zero2", 8, "zero2"), ("ddp", 8, "ddp")],
)
def test_a_named_engine_is_kept_on_any_number_of_gpus(engine: str, gpus: int, expected: str) -> None:
    """A run that asks for one goes on wherever it lands; of one process DDP is that process."""
    lora = {"use_peft": True, "lora_r": 8}
    assert fit(named(engine, **lora), shape(gpus, 12), architecture()).engine == expected


def test_a_named_engine_of_deepspeed_may_offload() -> None:
    """As far as it must, and no other engine in its place."""
    planned = fit(named("zero3"), shape(4, 48, "A100", 680.0), architecture())
    assert (planned.engine, planned.offload_optimizer) == ("zero3", True)
    with pytest.raises(NoFit, match="leave out `engine: fsdp2`"):
        fit(named("fsdp2"), shape(2, 24, "A100", 680.0), architecture())


def test_fsdp_steps_no_optimizer_of_bitsandbytes() -> None:
    """Its kernels take whole tensors; the message names one that does."""
    with pytest.raises(
        NoFit, match="`optim: paged_adamw_8bit` cannot step the weights that FSDP2 shards"
    ) as told:
        fit(named("fsdp2", optim="paged_adamw_8bit"), shape(8, 96), architecture())
    assert told.value.hint == "take `optim: adamw_torch_fused`, or leave out `engine: fsdp2`"


def test_the_cpu_has_the_named_engine_too() -> None:
    """FSDP2 can be tried on a laptop, and the reason names it."""
    planned = fit(recipe(8).model_copy(update={"engine": "fsdp2"}), shape(0), None)
    assert (planned.engine, planned.words()) == ("fsdp2", "CPU, FSDP2, micro batch 8 x 1")
    assert "FSDP2: set by the recipe (`engine: fsdp2`)" in planned.reasons

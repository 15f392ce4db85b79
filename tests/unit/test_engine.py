"""What a fit makes of DeepSpeed and of FSDP, compared whole."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.fit import Fit
from trainer.recipe import Recipe, load
from trainer.worker.engine import config, config_name, deepspeed_config, settings


def recipe(**trainer_args: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "method": "sft",
            "model_name_or_path": "org/model",
            "dataset_mixture": {"datasets": [{"id": "generated:chats"}]},
            "global_batch_size": 128,
            "trainer_args": trainer_args,
        }
    )


def fit(engine: str, **changes: Any) -> Fit:
    layout: dict[str, Any] = {
        "processes": 8,
        "micro_batch": 4,
        "accumulation": 4,
        "engine": engine,
        "attention": "sdpa",
        "activation_checkpointing": True,
        "reference": "none",
        "threads": 12,
        "use_cpu": False,
        "reasons": (),
    }
    return Fit.model_validate({**layout, **changes})


COMMON = {
    "train_batch_size": 128,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
}
ZERO3 = {
    "stage": 3,
    "contiguous_gradients": True,
    "overlap_comm": True,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_gather_16bit_weights_on_model_save": False,
}
ZERO2 = {
    "stage": 2,
    "contiguous_gradients": True,
    "overlap_comm": False,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
}
PINNED = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_whole_replicas_need_no_deepspeed(engine: str) -> None:
    """One process and DDP are Accelerate's own."""
    assert (
        deepspeed_config(recipe(), fit(engine, processes=1 if engine == "single" else 8), has_bf16=True)
        is None
    )


def test_zero_2() -> None:
    """Gradients and optimizer are cut, in the buckets that the memory counted."""
    assert deepspeed_config(recipe(), fit("zero2"), has_bf16=True) == {**COMMON, "zero_optimization": ZERO2}


def test_zero_3() -> None:
    """Parameters are cut too, in the sizes that the memory counted."""
    assert deepspeed_config(recipe(), fit("zero3"), has_bf16=True) == {**COMMON, "zero_optimization": ZERO3}


@pytest.mark.parametrize(("optim", "own"), [("adamw_torch", True), ("rmsprop", False), ("adagrad", True)])
def test_an_offloaded_optimizer_is_the_recipes(optim: str, own: bool) -> None:
    """DeepSpeed has an Adam for the host; what it has none for is stepped by torch, and never by that Adam."""
    found = deepspeed_config(recipe(optim=optim), fit("zero2", offload_optimizer=True), has_bf16=True)
    assert found == {
        **COMMON,
        "zero_force_ds_cpu_optimizer": own,
        "zero_optimization": {**ZERO2, "offload_optimizer": PINNED},
    }


def test_notus_with_all_offloaded() -> None:
    """Notus' own setting: RMSprop, optimizer and parameters in pinned memory, 8 pairs x 8 x 1."""
    notus = load("notus-7b/dpo_full").recipe
    eight = fit(
        "zero3",
        micro_batch=8,
        accumulation=1,
        offload_optimizer=True,
        offload_parameters=True,
        reference="model",
    )
    found = deepspeed_config(notus, eight, has_bf16=True)
    assert found == {
        **COMMON,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**ZERO3, "offload_optimizer": PINNED, "offload_param": PINNED},
    }


def test_nothing_is_pinned_on_the_cpu() -> None:
    """There is no GPU to copy to, and torch cannot pin without one."""
    found = deepspeed_config(
        recipe(bf16=False), fit("zero3", use_cpu=True, offload_optimizer=True), has_bf16=False
    )
    assert found is not None
    assert found["zero_optimization"] == {
        **ZERO3,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert found["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("said", "bf16", "fp16"),
    [({}, True, False), ({"bf16": False}, False, False), ({"fp16": True}, False, True)],
)
def test_precision_is_the_recipes(said: dict[str, Any], bf16: bool, fp16: bool) -> None:
    """Silence means bf16 where the hardware has it."""
    found = deepspeed_config(recipe(**said), fit("zero3"), has_bf16=True)
    assert found is not None
    assert (found["bf16"], found["fp16"]) == ({"enabled": bf16}, {"enabled": fp16})


@pytest.mark.parametrize(("said", "expected"), [(0.3, 0.3), (0, 0.0)])
def test_clipping_is_the_recipes(said: float, expected: float) -> None:
    """DeepSpeed clips itself; 0 is not at all."""
    found = deepspeed_config(recipe(max_grad_norm=said), fit("zero3"), has_bf16=True)
    assert found is not None
    assert found["gradient_clipping"] == expected


FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "SHARDED_STATE_DICT",
    "cpu_offload": False,
    "cpu_ram_efficient_loading": False,
    "activation_checkpointing": False,
}


def test_fsdp() -> None:
    """Layer by layer, a checkpoint of parts, gradients cut at every micro batch; on the CPU in a state made before."""
    cut = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    found = config(recipe(), fit("fsdp2"), has_bf16=True)
    assert found == {"fsdp": True, "fsdp_config": FSDP, "accelerator_config": cut}
    assert settings(found, fit("fsdp2")) == {"use_cpu": False, **found}
    on_cpu = config(recipe(), fit("fsdp2", use_cpu=True), has_bf16=False)
    assert on_cpu == {**found, "accelerator_config": {**cut, "use_configured_state": True}}
    assert (config_name(fit("fsdp2")), config_name(fit("zero3"))) == ("fsdp", "deepspeed")


def test_transformers_cannot_write_into_the_config() -> None:
    """It adds its own defaults to the mapping that it is given; the run keeps what was decided."""
    found = config(recipe(), fit("fsdp2"), has_bf16=True)
    settings(found, fit("fsdp2"))["fsdp_config"]["xla"] = False
    assert found is not None
    assert found["fsdp_config"] == FSDP


def test_on_the_cpu_accelerate_is_given_a_state_that_knows_deepspeed() -> None:
    """It would take gloo for DDP otherwise."""
    config = {"any": 1}
    assert settings(config, fit("zero3")) == {"use_cpu": False, "deepspeed": config}
    assert settings(config, fit("zero3", use_cpu=True)) == {
        "use_cpu": False,
        "deepspeed": config,
        "accelerator_config": {"use_configured_state": True},
    }
    assert settings(None, fit("ddp", use_cpu=True)) == {"use_cpu": True}

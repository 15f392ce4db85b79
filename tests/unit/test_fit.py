"""Tests of the fit: the fastest layout that fits into memory, with the exact global batch; errors name what would fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.architecture import Architecture, known_architecture
from trainer.errors import NoFit, RecipeError
from trainer.fit import LARGEST_GPU_MICRO_BATCH, LARGEST_MICRO_BATCH, Fit, fit
from trainer.hardware import Shape, gpu
from trainer.recipe import DataSource, Mixture, Recipe

ZEPHYR = "alignment-handbook/zephyr-7b-sft-full"
sizes = st.integers(1, 512)


def architecture(name: str = ZEPHYR) -> Architecture:
    found = known_architecture(name)
    assert found is not None
    return found


SMALL = architecture("HuggingFaceTB/SmolLM2-135M")


def recipe(batch: int, micro: int | None = None) -> Recipe:
    return Recipe(
        name="a",
        method="sft",
        init="tiny",
        dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
        global_batch_size=batch,
        micro_batch_size=micro,
    )


def dpo(*, offload: Any = None, batch: int = 64, **keys: Any) -> Recipe:
    """Return the handbook's full DPO of Zephyr, with changed keys."""
    of_model = ("dtype", "use_peft", "load_in_4bit", "use_bnb_nested_quant", "attn_implementation")
    model = {"dtype": "bfloat16"} | {
        key: value for key, value in keys.items() if key in of_model or key.startswith("lora_")
    }
    trainer = {"max_length": 1024, "bf16": True, "optim": "adamw_torch"}
    return Recipe(
        name="zephyr-7b/dpo",
        method="dpo",
        model_name_or_path=ZEPHYR,
        dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
        global_batch_size=batch,
        offload=offload,
        trainer_args=trainer | {key: value for key, value in keys.items() if key not in model},
        model_args=model,
    )


def qlora(**keys: Any) -> Recipe:
    """Zephyr's QLoRA DPO: rank 128 on every projection, 4-bit, paged AdamW."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    four_bits = {"use_peft": True, "load_in_4bit": True, "lora_r": 128, "lora_target_modules": targets}
    return dpo(**{**four_bits, "optim": "paged_adamw_32bit", **keys})


def shape(
    count: int = 0, cores: int = 8, name: str = "A100-80GB", host_gib: float = 1360.0, nodes: int = 1
) -> Shape:
    return Shape(
        accelerator=name if count else None,
        count=count,
        memory_gib=gpu(name).memory_gib if count else None,
        cores=cores,
        host_memory_gib=host_gib,
        node="a",
        nodes=nodes,
    )


def test_a_cpu_takes_the_whole_batch_with_all_its_cores() -> None:
    """Without a GPU there is one process. Without an architecture, a reason states that memory is not predicted."""
    assert fit(recipe(12), shape(cores=2), None) == Fit(
        processes=1,
        micro_batch=6,
        engine="single",
        attention="sdpa",
        activation_checkpointing=True,
        reference="none",
        accumulation=2,
        threads=2,
        use_cpu=True,
        reasons=(
            "1 process",
            "micro batch 6: the largest up to 8 that divides the 12 rows of a process",
            "accumulation 2: 1 x 6 x 2 = 12",
            "2 threads per process: 2 cores for 1",
            "memory: not predicted, because the architecture or the maximum length is unknown",
        ),
    )


def test_a_cpu_s_memory_is_predicted_where_the_model_is_known() -> None:
    """The architecture changes only the prediction, and whether activations are recomputed."""
    known, unknown = fit(recipe(12), shape(), SMALL), fit(recipe(12), shape(), None)
    same = {"host": known.host, "reasons": known.reasons, "activation_checkpointing": False}
    assert known == unknown.model_copy(update=same)
    assert known.host.gib > 0
    assert not known.gpu.terms


def test_a_cpu_keeps_activations_where_there_is_room() -> None:
    """Activations may take half of the memory, and only if the recipe does not set checkpointing."""
    kept = fit(recipe(12), shape(), SMALL)
    assert "no activation checkpointing: all activations fit" in kept.reasons
    small = shape(host_gib=1.9 * kept.host.gib)
    assert fit(recipe(12), small, SMALL).activation_checkpointing
    assert fit(recipe(12), small, SMALL).host.gib < kept.host.gib
    for said in (True, False):
        wanted = recipe(12).model_copy(update={"trainer_args": {"gradient_checkpointing": said}})
        assert fit(wanted, shape(), SMALL).activation_checkpointing is said


def test_a_model_too_large_for_a_cpu_is_refused() -> None:
    """A run that would exceed the machine's memory is refused."""
    with pytest.raises(NoFit, match=r"needs .* GiB of memory; cpu"):
        fit(dpo(bf16=False), shape(host_gib=24.0), architecture())


def test_gpus_share_the_batch_and_the_cores() -> None:
    """Each GPU has one process, with an equal part of batch and cores."""
    planned = fit(recipe(128), shape(8, cores=96), SMALL)
    assert (planned.processes, planned.micro_batch * planned.accumulation, planned.threads) == (8, 16, 12)
    assert not planned.use_cpu


@settings(deadline=None)
@given(
    batch=sizes,
    count=st.integers(0, 16),
    cores=st.integers(1, 256),
    nodes=st.integers(1, 4),
)
def test_the_global_batch_is_exact_on_any_shape_that_fits(
    batch: int, count: int, cores: int, nodes: int
) -> None:
    """A shape changes the split and never the batch. Only uneven shares are refused."""
    nodes = nodes if count else 1
    try:
        planned = fit(recipe(batch), shape(count, cores, nodes=nodes), SMALL)
    except NoFit:
        assert batch % (count * nodes)
        return
    assert planned.processes * planned.micro_batch * planned.accumulation == batch
    assert planned.processes == max(count * nodes, 1)
    assert planned.micro_batch <= (LARGEST_GPU_MICRO_BATCH if count else LARGEST_MICRO_BATCH)
    assert planned.threads >= 1


@settings(deadline=None)
@given(micro=st.integers(1, 32), parts=st.integers(1, 16), count=st.sampled_from([0, 1, 2, 4, 8]))
def test_a_wish_for_the_micro_batch_is_never_exceeded(micro: int, parts: int, count: int) -> None:
    """A recipe's micro batch that fits is used as it is."""
    batch = micro * parts * max(count, 1)
    planned = fit(recipe(batch, micro), shape(count), SMALL)
    assert planned.micro_batch == micro
    assert planned.processes * planned.micro_batch * planned.accumulation == batch


def test_a_wish_too_large_for_a_share_gives_way() -> None:
    """A micro batch above a process's share is reduced to the share."""
    planned = fit(recipe(16, 16), shape(8), SMALL)
    assert (planned.micro_batch, planned.accumulation) == (2, 1)
    assert "micro batch 2: the whole share of a process" in planned.reasons


def test_an_uneven_share_names_the_nearest_that_works() -> None:
    """The hint names the nearest GPU counts, and the nearest batches, which change the training."""
    with pytest.raises(NoFit) as caught:
        fit(recipe(128), shape(3), SMALL)
    assert caught.value.message == (
        "recipe a has global_batch_size 128, which 3 GPUs (A100-80GB:3) cannot share evenly"
    )
    assert caught.value.hint == (
        "take 2 or 4 GPUs, or change the training: `global_batch_size=126` or `global_batch_size=129`"
    )


def test_more_gpus_than_samples_do_not_fit() -> None:
    """More GPUs than rows in the batch are refused."""
    with pytest.raises(NoFit, match="take 4 GPUs, or change the training: `global_batch_size=8`"):
        fit(recipe(4), shape(8), SMALL)


def test_a_gpu_needs_the_model_s_numbers() -> None:
    """A fit on a GPU needs a known architecture."""
    with pytest.raises(NoFit, match=r"the architecture of the model .* is unknown"):
        fit(dpo(), shape(8), None)


def test_sequences_of_any_length_need_any_memory() -> None:
    """A recipe without a maximum length is rejected."""
    with pytest.raises(RecipeError, match="max_length: null"):
        fit(dpo(max_length=None), shape(8), architecture())


# The seeds' cases


def test_full_dpo_of_7b_needs_no_offload_on_eight_of_80_gb() -> None:
    """Eight GPUs of 80 GB hold Zephyr's full DPO without offload."""
    planned = fit(dpo(), shape(8, 96), architecture())
    assert planned.engine in ("zero2", "zero3")
    assert not planned.offload_optimizer
    assert planned.reference == "precomputed"
    assert planned.attention == "flash_attention_2"
    assert planned.gpu.gib < gpu("A100-80GB").usable_gib
    assert planned.words().endswith("no offload")


@pytest.mark.parametrize(("host_gib", "cores"), [(1800.0, 124), (680.0, 96)], ids=["Lambda", "GCP"])
def test_full_dpo_of_7b_fits_eight_of_40_gb(host_gib: float, cores: int) -> None:
    """Notus' shape: nothing is offloaded; with a second model in memory the parameters have to be cut too."""
    planned = fit(dpo(), shape(8, cores, "A100", host_gib), architecture())
    assert planned.engine in ("zero2", "zero3")
    assert not planned.offload_optimizer
    assert planned.gpu.gib < gpu("A100").usable_gib
    second = fit(dpo(precompute_ref_log_probs=False), shape(8, cores, "A100", host_gib), architecture())
    assert (second.engine, second.offload_optimizer, second.reference) == ("zero3", False, "model")


def test_offload_goes_as_far_as_it_must() -> None:
    """Four GPUs of 40 GB cannot hold the state of 7B; their host can."""
    planned = fit(dpo(), shape(4, 48, "A100", 680.0), architecture())
    assert (planned.offload_optimizer, planned.offload_parameters) == (True, False)
    assert any("ZeRO-3 needs" in reason for reason in planned.reasons)


def test_notus_own_setting_is_had_on_request() -> None:
    """Everything offloaded, with RMSprop and a second model, though less would do."""
    theirs = dpo(offload="all", optim="rmsprop", precompute_ref_log_probs=False)
    planned = fit(theirs, shape(8, 96, "A100", 680.0), architecture())
    assert planned.offload_optimizer
    assert planned.offload_parameters
    assert planned.host.gib_of("offloaded optimizer") == pytest.approx(8 * 7.241732096e9 / 2**30)
    assert planned.host.gib_of("offloaded parameters") > 13.4
    assert "set by the recipe (`offload: all`)" in " ".join(planned.reasons)


def test_a_recipe_may_forbid_offload() -> None:
    """The hint is to leave out `offload: none`."""
    with pytest.raises(NoFit, match="leave out `offload: none`"):
        fit(dpo(offload="none"), shape(4, 48, "A100", 680.0), architecture())


def test_a_host_too_small_for_what_is_offloaded_is_refused() -> None:
    """An offload that exceeds the host's memory is refused."""
    with pytest.raises(NoFit, match="of each host's memory"):
        fit(dpo(offload="all"), shape(8, 96, "A100", 128.0), architecture())


@pytest.mark.parametrize("name", ["L4", "A10", "RTX3090", "A100", "A6000"])
def test_qlora_of_7b_fits_one_gpu_of_24_gb_and_up(name: str) -> None:
    """The reference is the model without its adapter, so there is one model only."""
    planned = fit(qlora(), shape(1, 8, name, 64.0), architecture())
    assert (planned.engine, planned.reference, planned.processes) == ("single", "adapters_off", 1)


@pytest.mark.parametrize("name", ["T4", "V100", "V100-32GB"])
def test_what_computes_in_bf16_does_not_run_without(name: str) -> None:
    """It is refused by name; the way out is other hardware, or another recipe, but not for QLoRA's bf16 adapters."""
    with pytest.raises(NoFit, match="bfloat16, which") as caught:
        fit(qlora(bf16=False, fp16=True, dtype="float16"), shape(1, 8, name, 64.0), architecture())
    assert ", L4," in (caught.value.hint or "")
    with pytest.raises(
        NoFit, match="or change the training's precision: `bf16=false fp16=true dtype=float16`"
    ):
        fit(dpo(), shape(8, 96, name), architecture())


def test_qlora_is_never_a_choice_of_ours() -> None:
    """Full DPO does not fit one small GPU; 4 bits would be another model."""
    with pytest.raises(NoFit):
        fit(dpo(), shape(1, 8, "L4", 64.0), architecture())


def test_a_refusal_has_what_is_needed_what_is_there_and_what_would_do() -> None:
    """The nearest ways out are the smallest GPU that holds it, and what the recipe could leave out."""
    small = shape(1, 8, "RTX5090", 64.0).model_copy(update={"memory_gib": 12.0})
    with pytest.raises(NoFit) as caught:
        fit(dpo(use_peft=True, lora_r=16, offload="none"), small, architecture())
    assert (
        "GiB of each GPU's memory; RTX5090:1 has 11.8 available (parameters 13.5 GiB" in caught.value.message
    )
    assert caught.value.hint == "take L4:1, or leave out `offload: none`"


def test_a_refusal_names_how_many_of_the_same_would_do() -> None:
    """The hint names the count of the same GPU that would fit."""
    with pytest.raises(NoFit, match="take RTX5090:1 or L4:2, or leave"):
        fit(dpo(use_peft=True, offload="none"), shape(1, 8, "L4", 512.0), architecture("Qwen/Qwen2.5-14B"))


def test_a_request_for_checkpointing_is_kept() -> None:
    """The recipe's checkpointing is used, by its new key or its old key."""
    on = fit(dpo(gradient_checkpointing=True), shape(8, 96), architecture())
    off = fit(dpo(activation_checkpointing=False), shape(8, 96), architecture())
    assert (on.activation_checkpointing, off.activation_checkpointing) == (True, False)


def test_a_request_for_an_attention_is_kept() -> None:
    """The recipe's attention is used, except FlashAttention on a GPU that cannot run it."""
    asked = fit(dpo(attn_implementation="sdpa"), shape(8, 96), architecture())
    assert asked.attention == "sdpa"
    old = fit(
        dpo(attn_implementation="flash_attention_2", use_peft=True, bf16=False, fp16=True, dtype="float16"),
        shape(1, 8, "V100-32GB", 64.0),
        architecture(),
    )
    assert old.attention == "sdpa"


def with_memory(count: int, gpu_gib: float, host_gib: float) -> Shape:
    return shape(count, 64, "A100-80GB", host_gib).model_copy(update={"memory_gib": gpu_gib})

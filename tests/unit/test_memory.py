"""Tests of the memory terms: they match published numbers for 7B, and sharding, offload or quantisation changes only the
terms that it should.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.architecture import Architecture, known_architecture
from trainer.memory import GIB, Layout, checkpoint_bytes, lora_of, predict_usage, predict_usage_with_staging
from trainer.memory.precision import NF4_DOUBLE_BITS
from trainer.recipe import DataSource, Mixture, Recipe

BILLIONS = 7.241732096
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mistral() -> Architecture:
    found = known_architecture("mistralai/Mistral-7B-v0.1")
    assert found is not None
    return found


def recipe(method: Any = "dpo", model: dict[str, Any] | None = None, **trainer: Any) -> Recipe:
    return Recipe(
        name="a",
        method=method,
        model_name_or_path="mistralai/Mistral-7B-v0.1",
        dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
        global_batch_size=64,
        trainer_args={"max_length": 1024, "bf16": True, "optim": "adamw_torch_fused", **trainer},
        model_args={"dtype": "bfloat16", **(model or {})},
    )


def layout(engine: str = "zero3", **changes: Any) -> Layout:
    single = engine == "single"
    return Layout.model_validate(
        {
            "processes": 1 if single else 8,
            "micro_batch": 8,
            "engine": engine,
            "attention": "flash_attention_2",
            "activation_checkpointing": True,
            "reference": "model",
            **changes,
        }
    )


def gpu(what: Recipe, how: Layout) -> dict[str, float]:
    """Return billions of bytes on a GPU, by term."""
    return {each.name: each.gib * GIB / 1e9 for each in predict_usage(what, mistral(), how)[0].terms}


def host(what: Recipe, how: Layout) -> dict[str, float]:
    return {each.name: each.gib * GIB / 1e9 for each in predict_usage(what, mistral(), how)[1].terms}


def test_zero_3_cuts_sixteen_bytes_for_each_weight() -> None:
    """2 of parameters, 2 of gradients, 12 of masters and Adam's states (arXiv:1910.02054), and 2 of the reference."""
    terms = gpu(recipe(), layout("zero3"))
    assert terms["parameters"] == pytest.approx(2 * BILLIONS / 8, rel=1e-3)
    assert terms["gradients"] == pytest.approx(2 * BILLIONS / 8)
    assert terms["masters"] + terms["optimizer"] == pytest.approx(12 * BILLIONS / 8)
    assert terms["reference"] == pytest.approx(2 * BILLIONS / 8)


def test_fsdp_2_cuts_the_same_sixteen_bytes() -> None:
    """FSDP2 has float32 weights that are their own masters, float32 gradients and AdamW's two values; ZeRO-3 has 2 + 2 + 12
    bytes. FSDP2 gathers layers in bf16, and has no buckets of a fixed size.
    """
    terms, theirs = gpu(recipe(), layout("fsdp2")), gpu(recipe(), layout("zero3"))
    assert terms["parameters"] == pytest.approx(4 * BILLIONS / 8)
    states = ("parameters", "gradients", "masters", "optimizer")
    assert sum(terms.get(name, 0) for name in states) == pytest.approx(
        sum(theirs[name] for name in states), rel=1e-3
    )
    layer, head = mistral().layer_parameters, mistral().embedding_parameters
    assert terms["gathered"] == pytest.approx(2 * 2 * (3 * layer + head) / 1e9)
    assert terms["buckets"] == pytest.approx(2 * 2 * layer / 1e9)
    assert terms["gathered"] + terms["buckets"] < theirs["gathered"] + theirs["buckets"]


def test_fsdp_2_cuts_an_adapter_too() -> None:
    """The frozen base is in the recipe's dtype, the adapter in float32, and both are sharded over all GPUs."""
    lora = recipe(model={"use_peft": True, "lora_r": 8})
    terms, whole = gpu(lora, layout("fsdp2")), gpu(lora, layout("ddp"))
    assert terms["parameters"] == pytest.approx(whole["parameters"] / 8)
    assert terms["adapter"] == pytest.approx(whole["adapter"] / 8)
    assert terms["optimizer"] == pytest.approx(whole["optimizer"] / 8)


def test_zero_2_keeps_whole_parameters() -> None:
    """ZeRO-2 does not shard the parameters, and TRL does not shard the reference."""
    terms = gpu(recipe(), layout("zero2"))
    assert terms["parameters"] == terms["reference"] == pytest.approx(2 * BILLIONS)
    assert terms["gradients"] + terms["masters"] + terms["optimizer"] == pytest.approx(14 * BILLIONS / 8)
    assert "gathered" not in terms


def test_mixed_precision_without_zero_is_in_float32() -> None:
    """Bytes per weight: 4 of weights, 4 of gradients, 8 of states. DDP has the gradients twice. The reference has its loaded dtype."""
    single = gpu(recipe(), layout("single"))
    assert (single["parameters"], single["gradients"], single["optimizer"]) == pytest.approx(
        (4 * BILLIONS, 4 * BILLIONS, 8 * BILLIONS)
    )
    assert single["reference"] == pytest.approx(2 * BILLIONS)
    assert "masters" not in single
    assert gpu(recipe(), layout("ddp"))["gradients"] == pytest.approx(8 * BILLIONS)


def test_bf16_without_mixed_precision_is_bf16_throughout() -> None:
    """Without mixed precision a bf16 recipe takes 2 + 2 + 4 bytes per weight."""
    terms = gpu(recipe(bf16=False), layout("single"))
    total = terms["parameters"] + terms["gradients"] + terms["optimizer"]
    assert total == pytest.approx(8 * BILLIONS)


@pytest.mark.parametrize(
    ("optim", "each"),
    [
        ("rmsprop", 4.0),
        ("paged_adamw_32bit", 8.0),
        ("paged_adamw_8bit", 2 + 8 / 256),
        ("adamw_8bit", 2 + 8 / 256),
        ("sgd", 0.0),
        ("something_new", 12.0),
    ],
)
def test_an_optimizer_has_its_states(optim: str, each: float) -> None:
    """Eight-bit states have a float32 scale per block of 256. An unknown optimizer counts as larger than most."""
    terms = gpu(recipe(optim=optim), layout("single"))
    assert terms.get("optimizer", 0.0) == pytest.approx(each * BILLIONS)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    """The host holds 12 bytes of masters and states per weight, and float32 and bf16 gradients, rounded up because pinned."""
    how = layout("zero3", offload_optimizer=True)
    terms, of_host = gpu(recipe(), how), host(recipe(), how)
    assert not {"gradients", "masters", "optimizer"} & set(terms)
    assert terms["parameters"] == pytest.approx(2 * BILLIONS / 8, rel=1e-3)
    assert of_host["offloaded optimizer"] == pytest.approx(12 * BILLIONS)
    assert 6 * BILLIONS <= of_host["offloaded gradients"] <= 12 * BILLIONS
    assert "offloaded parameters" not in of_host


def test_offloading_everything_moves_both_models() -> None:
    """Only transient memory and small parameters stay on the GPU."""
    how = layout("zero3", offload_optimizer=True, offload_parameters=True)
    terms, of_host = gpu(recipe(), how), host(recipe(), how)
    assert terms["parameters"] < 0.01
    assert "reference" not in terms
    assert 4 * BILLIONS <= of_host["offloaded parameters"] <= 8 * BILLIONS


def test_nodes_share_what_is_offloaded() -> None:
    """With two nodes of four GPUs, each node holds half."""
    one = host(recipe(), layout("zero3", offload_optimizer=True))
    two = host(recipe(), layout("zero3", offload_optimizer=True, nodes=2))
    assert two["offloaded optimizer"] == pytest.approx(one["offloaded optimizer"] / 2)


def test_qlora_is_a_little_over_four_bits() -> None:
    """4 + 8/64 + 32/(64 x 256) bits of the projections (arXiv:2305.14314), and the rest in bf16."""
    assert pytest.approx(4.127, abs=1e-3) == NF4_DOUBLE_BITS
    four = {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True, "lora_r": 128}
    terms = gpu(
        recipe(model={**four, "lora_target_modules": ALL}), layout("single", reference="adapters_off")
    )
    linear, rest = mistral().linear_weights, mistral().parameters - mistral().linear_weights
    assert terms["parameters"] * 1e9 == pytest.approx(linear * NF4_DOUBLE_BITS / 8 + rest * 2)
    assert terms["adapter"] == pytest.approx(2 * 0.33554432)
    assert terms["optimizer"] == pytest.approx(4 * 0.33554432)
    assert "reference" not in terms


def test_an_adapter_has_r_times_inputs_and_outputs() -> None:
    """Notus' LoRA: rank 64 on q, k, v and o of 32 layers (arXiv:2106.09685, section 4.1)."""
    wanted = {"use_peft": True, "lora_r": 64, "lora_target_modules": ALL[:4]}
    lora = lora_of(recipe(model=wanted), mistral())
    assert lora is not None
    assert lora.parameters == 32 * 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024))


@pytest.mark.parametrize(
    ("targets", "count"),
    [(None, 2), (["all-linear"], 7), ("all-linear", 7), (["self_attn.q_proj"], 1), (".*(q_proj|o_proj)", 2)],
)
def test_an_adapter_s_targets_are_read_as_peft_reads_them(targets: Any, count: int) -> None:
    """A list of ends of names, a word for all, a pattern, or PEFT's own."""
    lora = lora_of(recipe(model={"use_peft": True, "lora_target_modules": targets}), mistral())
    assert lora is not None
    assert len(lora.targets) == count


def test_modules_trained_whole_are_counted() -> None:
    """They count as part of the adapter, because PEFT keeps a copy of them."""
    wanted = {"use_peft": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]}
    lora = lora_of(recipe(model=wanted), mistral())
    assert lora is not None
    assert lora.whole == 2 * 32000 * 4096


def test_logits_are_never_whole() -> None:
    """TRL's head takes a tile of them: a vocabulary eight times as large costs its frozen weights, and no more."""
    what, how = recipe(model={"use_peft": True}), layout("single", reference="adapters_off")
    large = mistral().model_copy(update={"vocab_size": 8 * 32000})
    more = predict_usage(what, large, how)[0].gib - predict_usage(what, mistral(), how)[0].gib
    assert more == pytest.approx(2 * 7 * 32000 * 4096 * 2 / GIB)


def test_label_smoothing_needs_whole_logits() -> None:
    """With label smoothing TRL does not use its tiled head."""
    smooth, plain = (
        predict_usage(recipe("sft", label_smoothing_factor=each), mistral(), layout(reference="none"))[
            0
        ].gib_of("work space")
        for each in (0.1, 0.0)
    )
    assert smooth > plain
    assert smooth * GIB > 8 * 1024 * 32000 * 10


def test_precomputed_log_probabilities_need_no_reference() -> None:
    """Neither the reference nor its gathered parameters are counted."""
    without = gpu(recipe(), layout("zero3", reference="precomputed"))
    assert "reference" not in without
    assert without["gathered"] < gpu(recipe(), layout("zero3"))["gathered"]


def test_checkpointing_keeps_a_layer_s_input() -> None:
    """16 sequences of 1024 tokens, 4096 numbers of 2 bytes, 32 layers: 4 GiB, and the head's."""
    kept = predict_usage(recipe(), mistral(), layout())[0].gib_of("activations")
    assert 4.0 < kept < 4.6
    whole = predict_usage(recipe(), mistral(), layout(activation_checkpointing=False))[0].gib_of(
        "activations"
    )
    assert whole > 90


def test_eager_attention_keeps_its_scores() -> None:
    """In float32 and in bf16: 6 bytes for each of heads x tokens squared (5 a s of arXiv:2205.05198 has no softmax in
    float32, and dropout).
    """
    eager, flash = (
        predict_usage(recipe(), mistral(), layout(activation_checkpointing=False, attention=kind))[0].gib_of(
            "activations"
        )
        for kind in ("eager", "flash_attention_2")
    )
    assert eager - flash > 0.9 * 6 * 16 * 32 * 1024**2 * 32 / GIB


def test_hosts_hold_every_process_s_models_while_they_load() -> None:
    """Eight processes each load a policy and a reference."""
    assert host(recipe(), layout("zero3"))["loading"] == pytest.approx(8 * 2 * 2 * BILLIONS)


def test_loading_and_training_do_not_add_up() -> None:
    """Loading is over before training begins, so the larger of both counts."""
    how = layout("zero3", offload_optimizer=True, offload_parameters=True)
    of_host = host(recipe(), how)
    offloaded = sum(size for name, size in of_host.items() if name.startswith("offloaded"))
    assert offloaded + of_host.get("loading", 0.0) == pytest.approx(max(offloaded, 8 * 2 * 2 * BILLIONS))


def test_three_checkpoints_wait_in_memory() -> None:
    """12 bytes for each weight: the float32 master and AdamW's two moments."""
    assert checkpoint_bytes(recipe(), mistral(), layout()) == pytest.approx(12e9 * BILLIONS)
    staged = predict_usage_with_staging(recipe(), mistral(), layout()).gib_of("staging")
    assert staged * GIB == pytest.approx(3 * 12e9 * BILLIONS)


def test_every_term_says_why() -> None:
    """Every term has a formula, and the terms add up to the total."""
    whole, cut = (layout("single"), layout("ddp")), (layout("zero2"), layout("fsdp2"))
    for how in (layout("zero3", offload_optimizer=True), *whole, *cut):
        for side in predict_usage(recipe(), mistral(), how):
            assert all(each.why for each in side.terms)
            assert side.gib == pytest.approx(sum(each.gib for each in side.terms))


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "single", "processes": 2},
        {"engine": "ddp", "processes": 1},
        {"engine": "ddp", "offload_optimizer": True},
        {"engine": "zero2", "offload_optimizer": True, "offload_parameters": True},
        {"engine": "zero3", "offload_parameters": True},
        {"engine": "fsdp2", "offload_optimizer": True},
        {"nodes": 3},
    ],
)
def test_a_layout_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    """An impossible layout is rejected by validation."""
    with pytest.raises(ValidationError):
        layout(**{"engine": "zero3", **wrong})


layouts = st.builds(
    lambda engine, micro, attention, checkpointing: layout(
        engine, micro_batch=micro, attention=attention, activation_checkpointing=checkpointing
    ),
    st.sampled_from(["single", "ddp", "zero2", "zero3", "fsdp2"]),
    st.integers(1, 16),
    st.sampled_from(["flash_attention_2", "sdpa", "eager"]),
    st.booleans(),
)


@settings(deadline=None)
@given(how=layouts, length=st.integers(64, 4096))
def test_more_at_once_takes_more(how: Layout, length: int) -> None:
    """A longer sequence or a larger micro batch never takes less; nor does keeping what could be computed again."""
    here = predict_usage(recipe(max_length=length), mistral(), how)[0].gib
    assert predict_usage(recipe(max_length=length + 64), mistral(), how)[0].gib >= here
    larger = how.model_copy(update={"micro_batch": how.micro_batch + 1})
    assert predict_usage(recipe(max_length=length), mistral(), larger)[0].gib >= here

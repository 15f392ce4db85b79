"""Tests of the seconds of a step: each term equals a count by hand, and changes in the right direction."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.architecture import Architecture
from trainer.errors import UserError
from trainer.estimate import Estimate, Rates, Workload, estimate
from trainer.estimate import batch as batches
from trainer.estimate.efficiency import MATMUL_EFFICIENCY, MEMORY_EFFICIENCY
from trainer.hardware import Shape
from trainer.memory import Layout
from trainer.recipe import Recipe

MISTRAL = Architecture(
    name="mistralai/Mistral-7B-v0.1", model_type="mistral", hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32000,
)  # fmt: skip
PAIRS = Workload(rows=61135, tokens=952, test_rows=2000, source="test")
CHATS = Workload(rows=207_865, tokens=1374, source="test")
ALL_LINEAR = {"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"}


def recipe(
    method: str = "dpo", batch: int = 128, model: dict[str, Any] | None = None, **arguments: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test", "method": method, "model_name_or_path": "mistralai/Mistral-7B-v0.1",
            "global_batch_size": batch, "dataset_mixture": {"datasets": [{"id": "test"}]},
            "trainer_args": {"num_train_epochs": 1, "max_length": 1024, **arguments}, "model_args": model or {},
        }
    )  # fmt: skip


def shape(name: str | None = "A100-80GB", count: int = 8, *, nodes: int = 1, cores: int = 96) -> Shape:
    return Shape(
        accelerator=name, count=count, memory_gib=80 if name else None, cores=cores, host_memory_gib=1000,
        node="test", nodes=nodes,
    )  # fmt: skip


def layout(processes: int = 8, micro: int = 4, **more: Any) -> Layout:
    given = {
        "engine": "zero3" if processes > 1 else "single", "attention": "flash_attention_2",
        "activation_checkpointing": True, "reference": "model", **more,
    }  # fmt: skip
    return Layout(processes=processes, micro_batch=micro, **given)


def of(found: Estimate, name: str) -> float:
    return sum(term.seconds for term in found.terms if term.name == name)


def sft(**more: Any) -> Estimate:
    given = {"packing": True, "max_length": 2048}
    return estimate(recipe("sft", **given), MISTRAL, layout(reference="none", **more), shape(), CHATS)


def dpo(made: Recipe | None = None, **more: Any) -> Estimate:
    return estimate(made or recipe(), MISTRAL, layout(**more), shape(), PAIRS)


def test_a_forward_pass_is_two_flops_a_weight_and_token_and_what_moves_between() -> None:
    """The forward term is matrix products, causal attention and elementwise bytes, counted here by hand."""
    tokens, weights = 4 * 2048, 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 32000 * 4096
    flops, memory = 312e12 * MATMUL_EFFICIENCY[8, 0], 2039e9 * MEMORY_EFFICIENCY
    products = 2 * weights * tokens / flops + 2 * weights / memory
    attention = 4 * 2048**2 / 2 * 4096 * 32 * 4 / (flops * 0.5)
    moved = (2 * 32 + 12) * 4096 + 18 * (4096 + 1024) + 10 * 14336
    elementwise = 32 * tokens * moved / memory
    assert of(sft(), "forward") == pytest.approx(4 * (products + attention + elementwise), rel=1e-6)


def test_a_step_is_the_sum_of_its_terms_and_each_says_why() -> None:
    """The terms add up to the step, and each has a reason."""
    found = dpo(recipe(eval_strategy="steps", eval_steps=100))
    assert found.step_s == pytest.approx(sum(term.seconds for term in found.terms))
    assert all(term.why and term.seconds > 0 for term in found.terms)
    assert found.hours == pytest.approx((found.load_s + found.steps * found.step_s + found.once_s) / 3600)
    assert found.work_s == pytest.approx(found.steps * (found.step_s - of(found, "saves")))
    assert {"forward", "recomputation", "backward", "reference", "optimizer", "evaluation"} <= {
        term.name for term in found.terms
    }


def test_checkpointing_costs_one_more_forward_pass() -> None:
    """Recomputation is as long as the forward pass, and absent without checkpointing."""
    assert of(sft(), "recomputation") == of(sft(), "forward")
    assert of(sft(activation_checkpointing=False), "recomputation") == 0


def test_frozen_weights_save_their_gradient() -> None:
    """LoRA's backward pass is shorter than that of the whole model, and its checkpoint a hundredth."""
    lora = recipe(model={**ALL_LINEAR, "lora_target_modules": ["q_proj"]})
    adapters, whole = dpo(lora, engine="ddp", reference="adapters_off"), dpo()
    assert of(adapters, "backward") < 0.75 * of(whole, "backward")
    assert adapters.checkpoint_bytes * 100 < whole.checkpoint_bytes


def test_four_bits_are_slower_than_sixteen() -> None:
    """QLoRA saves memory, not time: weights are unpacked, and activations are fp32."""
    q = dpo(recipe(model={**ALL_LINEAR, "load_in_4bit": True}), engine="ddp", reference="adapters_off")
    plain = dpo(recipe(model=ALL_LINEAR), engine="ddp", reference="adapters_off")
    assert q.step_s > plain.step_s


def test_the_reference_is_a_pass_each_step_or_once() -> None:
    """A second model passes with every batch; precomputed log-probabilities once, over all rows, sorted by length:
    they cost what is not padding, and no second or third epoch.
    """
    with_model, once = dpo(), dpo(reference="precomputed")
    assert of(with_model, "reference") > 0
    assert with_model.once_s == of(once, "reference") == 0
    assert 0.5 < once.once_s / (with_model.steps * of(with_model, "reference")) < 0.9
    thrice = dpo(recipe("dpo", num_train_epochs=3), reference="precomputed")
    assert thrice.steps == 3 * once.steps
    assert thrice.once_s == pytest.approx(once.once_s, rel=0.01)


def test_eager_attention_is_slower() -> None:
    """Eager attention writes every score to memory, so it is slower."""
    assert dpo(attention="eager").step_s > 1.1 * dpo().step_s


def test_offload_costs_time_and_most_of_it_on_the_cpu() -> None:
    """Adam on the host, gradients down, parameters up; torch's own optimizers are slower there than Adam."""
    adam = dpo(offload_optimizer=True, offload_parameters=True)
    rmsprop = dpo(recipe(optim="rmsprop"), offload_optimizer=True, offload_parameters=True)
    assert adam.step_s > dpo().step_s
    assert of(adam, "parameters from host") > 0
    assert of(adam, "gradients to host") > 0
    assert of(rmsprop, "optimizer") > 3 * of(adam, "optimizer") > 30 * of(dpo(), "optimizer")


def test_few_cores_make_an_offloaded_step_slow() -> None:
    """A node of 12 cores steps at a quarter of the rate of one of 48."""
    found = [
        estimate(recipe(), MISTRAL, layout(offload_optimizer=True), shape(cores=cores), PAIRS)
        for cores in (48, 12)
    ]
    assert of(found[1], "optimizer") == pytest.approx(4 * of(found[0], "optimizer"))


def test_a_slow_network_between_nodes_is_seen() -> None:
    """Traffic over two nodes takes their network's rate where that is the slower."""
    two = layout(16, 4, nodes=2)
    slow = estimate(recipe(), MISTRAL, two, shape(nodes=2), PAIRS, network_gbps=3.0)
    fast = estimate(recipe(), MISTRAL, two, shape(nodes=2), PAIRS, network_gbps=400.0)
    assert slow.step_s > 2 * fast.step_s


def test_packed_rows_have_no_padding() -> None:
    """Packing computes as many tokens as it trains on; padding computes more."""
    packed = batches.make_micro_batch(
        recipe("sft", packing=True, max_length=2048), layout(reference="none"), CHATS, in_order=True
    )
    padded = batches.make_micro_batch(
        recipe("sft", max_length=2048), layout(reference="none"), CHATS, in_order=True
    )
    assert packed.tokens == packed.real == 4 * 2048
    assert padded.tokens > padded.real


def test_steps_are_whole_batches_of_an_epoch() -> None:
    """61,135 pairs in batches of 128 are 477 steps; `max_steps` has the last word."""
    assert dpo().steps == 477
    assert dpo(recipe(num_train_epochs=3)).steps == 3 * 477
    assert dpo(recipe(num_train_epochs=1.5)).steps == 716
    assert dpo(recipe(max_steps=10)).steps == 10
    assert sft().steps == 207_865 * 1374 // 2048 // 128


def test_evaluations_and_saves_are_counted_as_the_trainer_does() -> None:
    """Evaluations and saves are counted by steps, by a fraction of the run, or by epochs."""
    assert batches.count_evaluations(recipe(eval_strategy="steps", eval_steps=100), 477) == 4
    assert batches.count_evaluations(recipe(eval_strategy="steps", eval_steps=0.25), 400) == 4
    assert batches.count_evaluations(recipe(eval_strategy="epoch", num_train_epochs=3), 477) == 3
    assert batches.count_evaluations(recipe(), 477) == 0
    assert batches.count_saves(recipe(save_steps=50), 477) == 9


def test_a_batch_split_otherwise_has_the_same_tokens() -> None:
    """The shape changes how long a step takes and never what is in it."""
    assert dpo(micro=1).tokens == dpo(micro=16).tokens == dpo(processes=4).tokens


@given(micro=st.sampled_from([1, 2, 4, 8]), factor=st.floats(1, 4))
@settings(deadline=None, max_examples=30)
def test_longer_rows_never_take_less(micro: int, factor: float) -> None:
    """More tokens per row take more seconds per step."""
    longer = PAIRS.model_copy(update={"tokens": PAIRS.tokens * factor})
    made = recipe(max_length=4096)
    short, long = (estimate(made, MISTRAL, layout(micro=micro), shape(), each) for each in (PAIRS, longer))
    assert long.step_s >= short.step_s


@pytest.mark.parametrize("micro", [1, 4])
def test_twice_the_gpus_never_take_longer(micro: int) -> None:
    """With one global batch on one node, more GPUs take less time per step."""
    seconds = [
        estimate(recipe(), MISTRAL, layout(count, micro), shape(count=count), PAIRS).step_s
        for count in (2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_a_save_is_short_and_its_upload_long() -> None:
    """Training waits only for the copy into memory. The upload follows at the given rate."""
    found = dpo()
    assert found.checkpoint_bytes == 12 * MISTRAL.parameters
    assert found.save_s < 10 < found.upload_s < found.restore_s
    slow = estimate(recipe(), MISTRAL, layout(), shape(), PAIRS, rates=Rates(bucket_gbps=0.1))
    assert slow.upload_s == pytest.approx(10 * found.upload_s)


def test_a_machine_without_a_gpu_is_estimated_by_its_cores() -> None:
    """A LoRA step of a 270 M model with 2 x 128 tokens takes seconds on two cores, as was measured."""
    gemma = Architecture(
        name="google/gemma-3-270m", model_type="gemma3_text", hidden_size=640, intermediate_size=2048,
        num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144,
        tie_word_embeddings=True,
    )  # fmt: skip
    made = recipe(batch=1, model={"use_peft": True, "lora_r": 16}, max_length=128)
    on = layout(1, 1, attention="sdpa", activation_checkpointing=False, reference="adapters_off")
    full = Workload(rows=100, tokens=256, source="test")
    assert 2 < estimate(made, gemma, on, shape(None, 0, cores=2), full).step_s < 8


def test_a_gpu_that_nobody_measured_says_so() -> None:
    """An unmeasured GPU has the lowest efficiency, and the reason of the first term states that it is unmeasured."""
    l4, a100 = (
        estimate(recipe(model=ALL_LINEAR), MISTRAL, layout(1, 1), shape(name, 1), PAIRS)
        for name in ("L4", "A100")
    )
    assert "no published run" in l4.terms[0].why
    assert "no published run" not in a100.terms[0].why


def test_an_unknown_gpu_is_refused_by_name() -> None:
    """A GPU outside the table is an error that names the nearest known GPU."""
    with pytest.raises(UserError, match="A100-8OGB"):
        estimate(recipe(), MISTRAL, layout(), shape("A100-8OGB"), PAIRS)

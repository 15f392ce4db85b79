"""Predicted bytes, held against what torch holds: weights, gradients, optimizer states, and what autograd saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trainer.architecture import Architecture
from trainer.architecture.table import ROWS, config_of, known_architecture
from trainer.memory import Case, Layout
from trainer.memory.activations import TokenBatch, predict_activations
from trainer.memory.resident import predict_adapter, predict_gradients, predict_optimizer, predict_parameters
from trainer.memory.transients import saved_head_bytes
from trainer.recipe import DataSource, Mixture, Recipe

SEQUENCES, LENGTH = 2, 96
WITHIN = 0.03
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBERS = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
KINDS = ["mistral", "llama", "qwen2", "qwen3", "gemma", "gemma3_text"]
DTYPES = {
    "float32": {"dtype": "float32", "bf16": False},
    "bfloat16": {"dtype": "bfloat16", "bf16": False},
    "mixed": {"dtype": "float32", "bf16": True},
    "bfloat16 mixed": {"dtype": "bfloat16", "bf16": True},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny(NamedTuple):
    """A small model, what is predicted of it, and the context that it computes in."""

    model: Any
    case: Case
    mixed: bool

    def step(self) -> None:
        """One forward and backward pass."""
        loss_of(self).backward()


def config_for(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **NUMBERS, "tie_word_embeddings": kind.startswith("gemma")}


def recipe_for(dtype: str, **model_args: Any) -> Recipe:
    wanted = DTYPES[dtype]
    return Recipe(
        name="a",
        method="sft",
        model_name_or_path="a/b",
        dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
        global_batch_size=SEQUENCES,
        trainer_args={"bf16": wanted["bf16"], "max_length": LENGTH, "optim": "adamw_torch"},
        model_args={"dtype": wanted["dtype"], "lora_dropout": 0.0, **model_args},
    )


def layout_for(*, attention: str = "sdpa", checkpointing: bool = False) -> Layout:
    return Layout.model_validate(
        {
            "processes": 1,
            "micro_batch": SEQUENCES,
            "engine": "single",
            "attention": attention,
            "activation_checkpointing": checkpointing,
            "reference": "none",
        }
    )


def tiny(
    kind: str = "mistral",
    dtype: str = "float32",
    *,
    attention: str = "sdpa",
    checkpointing: bool = False,
    **lora: Any,
) -> Tiny:
    """As the worker loads it and TRL prepares it."""
    torch.manual_seed(0)
    recipe = recipe_for(dtype, **lora)
    layout = layout_for(attention=attention, checkpointing=checkpointing)
    case = Case.of(
        recipe, Architecture.from_config(kind, config_for(kind)), layout, has_bf16=False, on_cpu=True
    )
    full_mixed = dtype == "bfloat16 mixed" and not lora
    weights = torch.float32 if full_mixed or DTYPES[dtype]["dtype"] == "float32" else torch.bfloat16
    config = AutoConfig.for_model(**config_for(kind))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=weights)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    if lora:
        model = with_lora(model, recipe)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads() if lora else None
    return Tiny(model.train(), case, bool(DTYPES[dtype]["bf16"]))


def with_lora(model: Any, recipe: Recipe) -> Any:
    from peft import get_peft_model
    from trl import ModelConfig, get_peft_config

    return get_peft_model(model, get_peft_config(ModelConfig(**recipe.model_args)))


def loss_of(tiny: Tiny, *, padded: bool = False) -> torch.Tensor:
    ids = torch.randint(1, 300, (SEQUENCES, LENGTH))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, LENGTH // 2 :] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=tiny.mixed):
        loss = tiny.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss
    assert isinstance(loss, torch.Tensor)
    return loss


class Saved:
    """Storages that autograd saves, the model's own apart."""

    def __init__(self, model: Any) -> None:
        self._own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, torch.Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[Saved]:
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield self

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own:
            self._kept[place] = tensor  # also keeps the address from being used again
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def saved_bytes(tiny: Tiny, *, padded: bool = False) -> int:
    with Saved(tiny.model).watched() as saved:
        loss = loss_of(tiny, padded=padded)
        found = saved.bytes
    del loss
    return found


def predicted(tiny: Tiny, *, padded: bool = False) -> float:
    tokens = TokenBatch(SEQUENCES, LENGTH)
    return predict_activations(tiny.case, tokens, padded=padded).bytes + saved_head_bytes(tiny.case, tokens)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_activations_are_as_predicted(
    kind: str, dtype: str, attention: str, checkpointing: bool
) -> None:
    """The count equals what autograd saves in a forward pass, for every model, precision and attention."""
    model = tiny(kind, dtype, attention=attention, checkpointing=checkpointing)
    assert predicted(model) == pytest.approx(saved_bytes(model), rel=WITHIN)


def test_a_mask_makes_fused_attention_keep_whole_keys_and_values() -> None:
    """For padded batches, torch's fused attention keeps as many keys as queries, and the mask."""
    model = tiny("mistral", "bfloat16")
    assert predicted(model, padded=True) == pytest.approx(saved_bytes(model, padded=True), rel=WITHIN)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL], ids=["q v", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed", "bfloat16 mixed"])
def test_lora_saves_what_is_predicted(
    dtype: str, dropout: float, targets: list[str], checkpointing: bool
) -> None:
    """Frozen projections keep no inputs; each adapter keeps its own, and a mask where it has dropout."""
    model = tiny(
        "mistral",
        dtype,
        checkpointing=checkpointing,
        use_peft=True,
        lora_r=8,
        lora_dropout=dropout,
        lora_target_modules=targets,
    )
    assert predicted(model) == pytest.approx(saved_bytes(model), rel=WITHIN)


def held(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_gradients_are_as_predicted(kind: str, dtype: str) -> None:
    """Every weight, and after a backward pass as much again."""
    model = tiny(kind, dtype)
    model.step()
    assert predict_parameters(model.case).bytes == pytest.approx(held(model.model.parameters()), rel=1e-6)
    grads = [each.grad for each in model.model.parameters() if each.grad is not None]
    assert predict_gradients(model.case).bytes == pytest.approx(held(grads), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "rmsprop",
        "sgd",
        "adagrad",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adamw_8bit",
    ],
)
def test_optimizer_states_are_as_predicted(name: str, dtype: str) -> None:
    """After a step, what the optimizer that Transformers makes of the name has in its state."""
    model = tiny("mistral", dtype)
    recipe = model.case.recipe
    recipe = recipe.model_copy(update={"trainer_args": {**recipe.trainer_args, "optim": name}})
    case = Case.of(recipe, model.case.architecture, model.case.layout, has_bf16=False)
    model.step()
    stepper = optimizer_named(name, model.model)
    stepper.step()
    states = [value for state in stepper.state.values() for value in state.values() if torch.is_tensor(value)]
    large = [value for value in states if value.numel() > 1 and not is_table(value)]
    assert predict_optimizer(case).bytes == pytest.approx(held(large), rel=WITHIN)


def is_table(value: torch.Tensor) -> bool:
    """Whether it is bitsandbytes' map of 256 codes, which all its states share."""
    return value.numel() == 256 and value.dtype == torch.float32


def optimizer_named(name: str, model: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    if name.endswith("bit"):
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()  # it keeps which weights, by number, other tests had in 32 bit
    arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none", bf16=False)
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return cls(model.parameters(), **settings)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL], ids=["q v", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_as_predicted(dtype: str, targets: list[str]) -> None:
    """LoRA's matrices are in float32 over a base of any precision, and so are their gradients and states."""
    model = tiny("llama", dtype, use_peft=True, lora_r=8, lora_target_modules=targets)
    trained = [each for each in model.model.parameters() if each.requires_grad]
    assert predict_adapter(model.case).bytes == held(trained)
    model.step()
    assert predict_gradients(model.case).bytes == held(each.grad for each in trained)
    stepper = torch.optim.AdamW(trained)
    stepper.step()
    states = [state[key] for state in stepper.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert predict_optimizer(model.case).bytes == held(states)


@pytest.mark.parametrize("nested", [False, True], ids=["once", "twice"])
def test_four_bits_are_as_predicted(tmp_path: Path, nested: bool) -> None:
    """Weights in NF4 with their constants, quantised once or twice; embeddings and norms stay as they are."""
    from transformers import BitsAndBytesConfig

    config = {**config_for("mistral"), "hidden_size": 256, "intermediate_size": 1024}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=four_bits, device_map={"": "cpu"}
    )
    recipe = recipe_for("bfloat16", use_peft=True, load_in_4bit=True, use_bnb_nested_quant=nested)
    case = Case.of(recipe, Architecture.from_config("a", config), layout_for(), has_bf16=False)
    assert predict_parameters(case).bytes == pytest.approx(
        held(model.parameters()) + constants(model), rel=WITHIN
    )


def constants(model: Any) -> int:
    """Bytes of the scales of quantised weights; the tables of codes, one for each matrix, are left out."""
    total = 0
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            total += held([state.absmax] + ([state.state2.absmax] if state.nested else []))
    return total


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ids[0])
def test_parameters_are_counted_as_transformers_makes_them(row: Any) -> None:
    """The count of every model of the table is that of its real modules, made with no memory."""
    config = AutoConfig.for_model(**config_of(row))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    counted = known_architecture(row.ids[0])
    assert counted is not None
    assert counted.parameters == sum(each.numel() for each in model.parameters())


GPU_FIT = {
    **layout_for().model_dump(),
    "accumulation": 1,
    "threads": 1,
    "use_cpu": False,
    "reasons": (),
}


@pytest.mark.parametrize(
    ("engine", "trained", "dtype"),
    [("single", True, torch.float32), ("single", False, torch.bfloat16), ("zero2", True, torch.bfloat16)],
)
def test_the_worker_loads_what_memory_counts(
    tmp_path: Path, engine: str, trained: bool, dtype: torch.dtype
) -> None:
    """Mixed precision steps float32 weights: DeepSpeed's masters, or else the policy itself; a reference is as it is."""
    from trainer.fit import Fit
    from trainer.worker.model import load
    from trainer.worker.model_source import Base

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_for("mistral"))).save_pretrained(tmp_path)
    planned = Fit.model_validate({**GPU_FIT, "engine": engine})
    loaded = load(Base(str(tmp_path), None), recipe_for("bfloat16 mixed"), planned, trained=trained)
    assert loaded.dtype == dtype


def test_the_worker_follows_the_fit_where_the_recipe_is_silent(tmp_path: Path) -> None:
    """The fit sets activation checkpointing and attention. TRL reads the recipe's own settings."""
    from trainer.fit import Fit
    from trainer.job import Job
    from trainer.worker.arguments import _fitted
    from trainer.worker.model import attention

    def job(recipe: Recipe, **changes: Any) -> Job:
        planned = Fit.model_validate({**GPU_FIT, **changes})
        return Job(
            run_id="a", attempt=1, recipe=recipe, fit=planned, work=tmp_path, model=None, resume_from=None
        )

    silent = recipe_for("bfloat16 mixed")
    said = silent.model_copy(update={"trainer_args": {**silent.trainer_args, "gradient_checkpointing": True}})
    assert _fitted(job(silent)) == {"gradient_checkpointing": False}
    assert _fitted(job(said)) == {}
    flash = job(silent, attention="flash_attention_2")
    assert attention(silent, flash.fit) is None  # no CUDA device here: left to Transformers
    wants = silent.model_copy(
        update={"model_args": {**silent.model_args, "attn_implementation": "flash_attention_2"}}
    )
    assert attention(wants, job(wants).fit) == "sdpa"

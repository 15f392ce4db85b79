"""Published training runs, as recipes, layouts and shapes: what `bench/estimate.py` is checked against.

Each run has its document. Values that are not in the document are marked as assumed.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from trainer.architecture import Architecture
from trainer.estimate import FUSED, Stack, Workload
from trainer.hardware import Shape, gpu
from trainer.memory import Layout
from trainer.recipe import Recipe

FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
TORCHTUNE = "https://github.com/pytorch/torchtune/blob/0031bfb080bd35ec533c412df883cf2bf7bf7fe4/README.md"
QWEN = "https://github.com/QwenLM/Qwen/blob/main/README.md#profiling-of-memory-and-speed"
HUB = "https://huggingface.co"

MISTRAL = Architecture(
    name="mistralai/Mistral-7B-v0.1", model_type="mistral", hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32000,
)  # fmt: skip
LLAMA_8B = Architecture(
    name="meta-llama/Llama-3.1-8B", model_type="llama", hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
)  # fmt: skip
LLAMA_70B = Architecture(
    name="meta-llama/Llama-3.1-70B", model_type="llama", hidden_size=8192, intermediate_size=28672,
    num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=128256,
)  # fmt: skip


def mpt(name: str, hidden: int, layers: int) -> Architecture:
    """Return an MPT model. Its inner layer of 4 x hidden has no gate, so a gated layer with as many weights stands for it."""
    return Architecture(
        name=name, model_type="llama", hidden_size=hidden, intermediate_size=round(8 * hidden / 3),
        num_hidden_layers=layers, num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
        head_dim=128, vocab_size=50368, tie_word_embeddings=True,
    )  # fmt: skip


QWEN_SIZES = {
    "1.8B": (2048, 24, 5504),
    "7B": (4096, 32, 11008),
    "14B": (5120, 40, 13696),
    "72B": (8192, 80, 24576),
}
"""Width, layers and inner width: config.json of https://huggingface.co/Qwen/Qwen-7B and its like."""


def qwen(size: str, length: int, seconds: float, *, count: int = 1, sets: bool = False) -> Published:
    """Return a row of Qwen's table: LoRA (r 64, all projections), one sequence a GPU, accumulation 8, A100-80GB; s/it."""
    hidden, layers, inner = QWEN_SIZES[size]
    model = Architecture(
        name=size, model_type="llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, head_dim=128, vocab_size=151936,
    )  # fmt: skip
    return Published(
        name=f"Qwen-{size} LoRA, {length} tokens, {count} x A100-80GB",
        source=QWEN,
        unit="s/step",
        value=seconds,
        recipe=recipe(
            size, "sft", 8 * count, {"packing": True, "max_length": length}, lora_r=64, **ALL_LINEAR
        ),
        architecture=model,
        layout=layout(count, 1),
        shape=shape("A100-80GB", count),
        workload=Workload(rows=10**5, tokens=length, source="inputs of one length"),
        sets=sets,
    )


class Published(NamedTuple):
    """A published run with its time."""

    name: str
    source: str
    unit: Literal["hours", "tokens/s/GPU", "s/step", "s of evaluation"]
    value: float
    recipe: Recipe
    architecture: Architecture
    layout: Layout
    shape: Shape
    workload: Workload
    stack: Stack | None = None
    network_gbps: float | None = None
    sets: bool = False
    """Whether it was used to set a factor."""
    note: str = ""


def shape(name: str, count: int, *, nodes: int = 1, cores: int = 96, host_gib: float = 1000) -> Shape:
    return Shape(
        accelerator=name, count=count, memory_gib=gpu(name).memory_gib, cores=cores, host_memory_gib=host_gib,
        node="published", nodes=nodes,
    )  # fmt: skip


def layout(processes: int, micro: int, **more: Any) -> Layout:
    single = {"engine": "single" if processes == 1 else "zero3", "attention": "flash_attention_2"}
    given = {**single, "activation_checkpointing": True, "reference": "none", **more}
    return Layout(processes=processes, micro_batch=micro, **given)


def recipe(name: str, method: str, batch: int, arguments: dict[str, Any], **model: Any) -> Recipe:
    known = {"num_train_epochs": 1, "save_strategy": "no", **arguments}
    return Recipe.model_validate(
        {
            "name": name, "method": method, "model_name_or_path": "published", "global_batch_size": batch,
            "dataset_mixture": {"datasets": [{"id": "published"}]}, "trainer_args": known, "model_args": model,
        }
    )  # fmt: skip


MPT_SIZES = {"1b": (2048, 24), "3b": (2560, 32), "7b": (4096, 32), "13b": (5120, 40), "30b": (7168, 48)}
"""Width and layers: scripts/train/yamls/pretrain/mpt-*.yaml of the same repository."""


def foundry(
    size: str, gpus: tuple[str, int], seq: tuple[int, int, int], rate: float, **more: Any
) -> Published:
    """Return a row of llm-foundry's tables: (sequence length, micro batch, accumulation), tokens/s/GPU."""
    length, micro, accumulation = seq
    name, count = gpus
    nodes = max(1, count // 8)
    checkpointing = more.pop("checkpointing", True)
    return Published(
        name=f"llm-foundry {size}, {length} tokens, {count} x {name}{'' if checkpointing else ', no checkpointing'}",
        source=FOUNDRY,
        unit="tokens/s/GPU",
        value=rate,
        recipe=recipe(size, "sft", micro * accumulation * count, {"packing": True, "max_length": length}),
        architecture=mpt(size, *MPT_SIZES[size]),
        layout=layout(count, micro, activation_checkpointing=checkpointing, nodes=nodes),
        shape=shape(name, count // nodes, nodes=nodes),
        workload=Workload(rows=10**6, tokens=length, source="synthetic"),
        stack=FUSED,
        network_gbps=200.0,
        **more,
    )


def torchtune(
    name: str, on: Shape, rate: float, architecture: Architecture, *, sets: bool = False, **model: Any
) -> Published:
    """Return a row of torchtune's table: batch 2, packed to 2048, compiled; tokens/s of all GPUs."""
    count = on.count
    return Published(
        name=f"torchtune {name}",
        source=TORCHTUNE,
        unit="tokens/s/GPU",
        value=rate / count,
        recipe=recipe(name, "sft", 2 * count, {"packing": True, "max_length": 2048}, **model),
        architecture=architecture,
        layout=layout(count, 2),
        shape=on,
        workload=Workload(rows=10**5, tokens=2048, source="packed"),
        stack=FUSED,
        sets=sets,
    )


ALL_LINEAR = {"use_peft": True, "lora_target_modules": "all-linear"}
FEEDBACK = Workload(rows=61135, tokens=952, test_rows=2000, source="`known_workload` of UltraFeedback")
DPO = {"max_length": 1024, "eval_strategy": "steps", "eval_steps": 100}

TIMED: tuple[Published, ...] = (
    foundry("7b", ("A100-80GB", 8), (1024, 64, 2), 4357, sets=True),
    foundry("7b", ("A100-80GB", 8), (2048, 6, 2), 4641, checkpointing=False, sets=True),
    foundry("7b", ("A100-80GB", 8), (4096, 16, 2), 3684, sets=True),
    foundry("13b", ("A100-80GB", 8), (1024, 40, 3), 2330),
    foundry("13b", ("A100-80GB", 8), (4096, 10, 3), 2060),
    foundry("3b", ("A100-80GB", 8), (2048, 10, 2), 10811, checkpointing=False),
    foundry("1b", ("A100-80GB", 8), (2048, 14, 4), 20513, checkpointing=False),
    foundry("30b", ("A100-80GB", 8), (2048, 3, 21), 916),
    foundry("7b", ("A100", 8), (1024, 24, 4), 3854),
    foundry("7b", ("A100", 8), (4096, 6, 4), 3366),
    foundry("7b", ("A100", 16), (2048, 16, 1), 3645),
    foundry("7b", ("H100", 8), (1024, 64, 2), 10203, sets=True),
    foundry("7b", ("H100", 8), (2048, 6, 1), 10643, checkpointing=False, sets=True),
    foundry("7b", ("H100", 8), (4096, 16, 2), 8611, sets=True),
    foundry("13b", ("H100", 8), (1024, 40, 3), 5502),
    foundry("13b", ("H100", 8), (4096, 10, 3), 4717),
    foundry("30b", ("H100", 8), (2048, 3, 21), 2002),
    foundry("3b", ("H100", 8), (1024, 20, 6), 27046, checkpointing=False),
    foundry("1b", ("H100", 8), (2048, 14, 1), 45455, checkpointing=False),
    torchtune("8B LoRA, RTX 4090", shape("RTX4090", 1), 3083, LLAMA_8B, sets=True, lora_r=8, **ALL_LINEAR),
    torchtune("8B QLoRA, RTX 4090", shape("RTX4090", 1), 2413, LLAMA_8B, lora_r=8, load_in_4bit=True, **ALL_LINEAR),
    torchtune("70B LoRA, 8 x A100", shape("A100-80GB", 8), 3497, LLAMA_70B, lora_r=16, **ALL_LINEAR),
    qwen("1.8B", 256, 1.0, sets=True),
    qwen("1.8B", 2048, 1.7),
    qwen("1.8B", 4096, 3.3),
    qwen("7B", 256, 1.2),
    qwen("7B", 512, 1.5),
    qwen("7B", 1024, 2.8),
    qwen("7B", 2048, 5.2),
    qwen("7B", 4096, 10.1),
    qwen("14B", 512, 2.4),
    qwen("14B", 2048, 8.4),
    qwen("14B", 4096, 17.0),
    qwen("72B", 512, 20.5, count=4, sets=True),
    qwen("72B", 2048, 45.7, count=4),
    Published(
        name="zephyr-7b-sft-full, 8 x H100",
        source=f"{HUB}/alignment-handbook/zephyr-7b-sft-full/blob/main/train_results.json",
        unit="hours", value=5608.2856 / 3600,
        recipe=recipe("sft_full", "sft", 128, {"packing": True, "max_length": 2048, "eval_strategy": "epoch"}),
        architecture=MISTRAL, layout=layout(8, 16), shape=shape("H100", 8),
        workload=Workload(rows=207865, tokens=1373.7, test_rows=23110, source="24.861 packed rows/s x 5608 s"),
        sets=True,
    ),
    Published(
        name="its evaluation",
        source=f"{HUB}/alignment-handbook/zephyr-7b-sft-full/blob/main/eval_results.json",
        unit="s of evaluation", value=142.67,
        recipe=recipe("sft_full", "sft", 128, {"packing": True, "max_length": 2048, "eval_strategy": "epoch"}),
        architecture=MISTRAL, layout=layout(8, 16), shape=shape("H100", 8),
        workload=Workload(rows=207865, tokens=1373.7, test_rows=23110, source="packed"),
    ),
    Published(
        name="zephyr-7b-sft-qlora, evaluation, 8 x H100",
        source=f"{HUB}/alignment-handbook/zephyr-7b-sft-qlora/blob/main/eval_results.json",
        unit="s of evaluation", value=358.57,
        recipe=recipe("sft_qlora", "sft", 128, {"packing": True, "max_length": 2048, "eval_strategy": "epoch"},
                      load_in_4bit=True, lora_r=16, **ALL_LINEAR),
        architecture=MISTRAL, layout=layout(8, 16, engine="ddp"), shape=shape("H100", 8),
        workload=Workload(rows=207865, tokens=1373.7, test_rows=23110, source="packed"), sets=True,
    ),
    Published(
        name="zephyr-7b-dpo-full, 8 x H100",
        source=f"{HUB}/alignment-handbook/zephyr-7b-dpo-full/blob/main/train_results.json",
        unit="hours", value=5328.4749 / 3600,
        recipe=recipe("dpo_full", "dpo", 128, DPO),
        architecture=MISTRAL, layout=layout(8, 8, attention="eager", reference="model"), shape=shape("H100", 8),
        workload=FEEDBACK, sets=True,
    ),
    Published(
        name="zephyr-7b-dpo-qlora, 8 x H100",
        source=f"{HUB}/alignment-handbook/zephyr-7b-dpo-qlora/blob/main/train_results.json",
        unit="hours", value=7610.489 / 3600,
        recipe=recipe("dpo_qlora", "dpo", 32, DPO, load_in_4bit=True, lora_r=128, **ALL_LINEAR),
        architecture=MISTRAL, layout=layout(8, 4, engine="ddp", reference="adapters_off"), shape=shape("H100", 8),
        workload=FEEDBACK,
    ),
    Published(
        name="zephyr-7b-beta (DPO), 2 x 8 x A100-80GB",
        source=f"{HUB}/HuggingFaceH4/zephyr-7b-beta/blob/main/all_results.json",
        unit="hours", value=23865.9828 / 3600,
        recipe=recipe("dpo_paper", "dpo", 32, {**DPO, "num_train_epochs": 3}),
        architecture=MISTRAL,
        layout=layout(16, 2, nodes=2, attention="eager", reference="model", activation_checkpointing=False),
        shape=shape("A100-80GB", 8, nodes=2),
        workload=FEEDBACK.model_copy(update={"rows": 61966, "test_rows": 1000}),
        network_gbps=50.0, note="network between the nodes not published",
    ),
    Published(
        name="notus-7b-v1-lora, 8 x A100",
        source=f"{HUB}/argilla/notus-7b-v1-lora-adapter/blob/main/all_results.json",
        unit="hours", value=18623.8854 / 3600,
        recipe=recipe("dpo_lora", "dpo", 512, {"max_length": 1024, "num_train_epochs": 3, "eval_strategy": "epoch",
                      "per_device_eval_batch_size": 4, "optim": "rmsprop"}, use_peft=True, lora_r=64,
                      lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        architecture=MISTRAL, layout=layout(8, 2, engine="ddp", attention="eager", reference="adapters_off"),
        shape=shape("A100", 8), workload=FEEDBACK.model_copy(update={"rows": 61619}), sets=True,
    ),
    Published(
        name="notus-7b-v1 (DPO), 8 x A100, offloaded",
        source="https://github.com/argilla-io/notus/blob/main/v1/LOGBOOK.md",
        unit="hours", value=12.0,
        recipe=recipe("dpo_notus", "dpo", 64, {**DPO, "num_train_epochs": 3, "per_device_eval_batch_size": 4,
                      "optim": "rmsprop"}),
        architecture=MISTRAL,
        layout=layout(8, 8, reference="model", offload_optimizer=True, offload_parameters=True),
        shape=shape("A100", 8, cores=124, host_gib=1800), workload=FEEDBACK.model_copy(update={"rows": 61619}),
    ),
)  # fmt: skip


def evaluation_of(name: str, seconds: float) -> Published:
    """Return one evaluation within a run, from its results file."""
    run = next(each for each in TIMED if each.name.startswith(name))
    return run._replace(name=f"{name}: an evaluation", unit="s of evaluation", value=seconds, sets=False)


RUNS = (*TIMED, evaluation_of("notus-7b-v1-lora", 143.4479), evaluation_of("zephyr-7b-beta", 48.0152))

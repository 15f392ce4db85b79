"""A committed checkpoint becomes a model for others: whole or adapter, merged right, and with what people look for."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.harness import ROOT
from tests.servers.hub_uploads import Hub
from tests.training.jobs import LORA, SMALL, Trained, make_job, train
from tests.training.ranks import ranks_job, run
from tests.training.test_training import model_of
from trainer.errors import ModelError
from trainer.job import Job, Publish
from trainer.worker import model, model_source, sources
from trainer.worker.checkpoint.format import (
    INDEX_FILE,
    SCALARS_FILE,
    Index,
    IndexedParameter,
    Scalars,
    Slice,
    rank_file,
)
from trainer.worker.publish_model import adapter_name, consolidate, publish, read_weights

SFT = "zephyr-tiny/sft"
QLORA = (
    "use_peft=true",
    "load_in_4bit=true",
    "use_bnb_nested_quant=true",
    "lora_r=4",
    "learning_rate=5.0e-2",
    "lora_target_modules=[q_proj, v_proj, down_proj]",
    "tiny={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}",
)
"""Rows of 64, which is what 4-bit numbers share a constant in, are the least that bitsandbytes computes with on a CPU."""
FEW = (
    *(each for each in SMALL if not each.startswith(("max_steps", "save_steps"))),
    "max_steps=2",
    "save_steps=2",
)
Small = Callable[..., Trained]


def published(trained: Trained, into: Path, step: int, **wishes: Any) -> Path:
    task = Publish(
        job=trained.job.model_copy(update={"work": into.parent / f"work-{into.name}"}),
        source=trained.checkpoint(step), step=step, card="---\ntags: [trl]\n---\n# A model\n", into=into,
        **{"merge": False, **wishes},
    )  # fmt: skip
    publish(task)
    return into


def logits(loaded: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded.eval()(ids).logits.float()


def ids() -> torch.Tensor:
    return torch.arange(5, 37).reshape(2, 16)


def test_a_checkpoint_of_all_weights_is_what_the_run_would_export(small: Small, tmp_path: Path) -> None:
    """The same tensors as `final/`, with tokenizer, template, generation config and card, and nothing of the run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = small(SFT)
    into = published(trained, tmp_path / "out", 4)
    mine, theirs = (load_file(each / "model.safetensors") for each in (into, trained.final))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {path.name for path in into.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(into).chat_template
    assert (
        AutoModelForCausalLM.from_pretrained(into).num_parameters() == trained.of("started")[0]["parameters"]
    )


def test_the_experts_of_a_model_are_exported_as_its_files_have_them(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers holds all experts of a layer in one tensor, and its files have a tensor for each expert. A checkpoint
    has the tensors in memory. Its export has those of the files, in one file or in several.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    base, made_from = tmp_path / "base", small(SFT).final
    tokenizer = AutoTokenizer.from_pretrained(made_from)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=len(tokenizer), initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    trained = train(make_job(tmp_path / "job", SFT, *FEW, "init=null", f"model_name_or_path={base}"))
    assert trained.outcome.status == "done", trained.outcome.message
    final = load_file(trained.final / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in final
    expected = logits(AutoModelForCausalLM.from_pretrained(trained.final), ids())
    for into, file_bytes in ((tmp_path / "one", 10**9), (tmp_path / "several", 40_000)):
        monkeypatch.setattr("trainer.worker.publish_model.FILE_BYTES", file_bytes)
        published(trained, into, 2)
        mine = exported_weights(into)
        assert mine.keys() == final.keys()
        assert all(torch.equal(mine[name], final[name]) for name in final)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(into), ids()), expected)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "several").glob("model-0000?-of-0000?.safetensors"))) > 2


def test_buffers_are_exported_as_they_are(small: Small, tmp_path: Path) -> None:
    """DeepSeek's routers have a buffer, which no optimizer steps. It is exported with the weights, in its own dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config

    base, made_from = tmp_path / "base", small(SFT).final
    tokenizer = AutoTokenizer.from_pretrained(made_from)
    config = DeepseekV3Config(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    made.get_buffer(name).data = torch.tensor([0.1, 0.2, 0.3, 0.4])
    made.save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = ("init=null", f"model_name_or_path={base}", "max_steps=2", "save_steps=2")
    trained = run(ranks_job(tmp_path / "job", SFT, *words, engine="fsdp2"))
    assert trained.outcome.status == "done", trained.outcome.message
    final = load_file(trained.final / "model.safetensors")
    mine = exported_weights(published(trained, tmp_path / "out", 2))
    assert mine.keys() == final.keys()
    assert all(torch.equal(mine[each], final[each]) for each in final)
    assert all(mine[each].dtype == final[each].dtype for each in final)
    index = Index.model_validate_json((trained.checkpoint(2) / INDEX_FILE).read_text())
    assert [each for each, parameter in index.parameters.items() if parameter.dtype is None] == [name]
    assert torch.equal(mine[name], torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_an_old_checkpoint_of_deepspeed_has_its_buffers(tmp_path: Path) -> None:
    """Format 1 keeps buffers beside DeepSpeed's partitions."""
    [folder] = ROOT.glob("tests/fixtures/bucket_v1/dpo_zero2/checkpoints/step-00000006/*")
    copy = shutil.copytree(folder, tmp_path / "checkpoint-6")
    [path] = copy.rglob("*model_states.pt")
    states = torch.load(path, weights_only=True)
    states["buffer_names"].append("model.scale")
    states["module"]["model.scale"] = torch.tensor([1.5])
    torch.save(states, path)
    consolidate(copy, tmp_path / "out")
    assert exported_weights(tmp_path / "out")["model.scale"].tolist() == [1.5]


def test_a_model_with_code_of_its_own_is_exported_without_running_it(masters: Path, tmp_path: Path) -> None:
    """Its weights have the same form in memory as in its files."""
    config = json.loads((masters / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (masters / "config.json").write_text(json.dumps(config))
    (masters / "generation_config.json").write_text("{}")
    consolidate(masters, tmp_path / "out")
    assert exported_weights(tmp_path / "out").keys() == read_weights(masters).keys()


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of all files. If there are several, the index names each with its file and the size of all."""
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    weights = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert len(weights) == sum(map(len, files.values()))
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    else:
        assert not (folder / "model.safetensors.index.json").exists()
    return weights


LAYERS, WIDTH = 24, 512


@pytest.fixture
def masters(tmp_path: Path) -> Path:
    """A checkpoint of a model in bfloat16 that two ranks of ZeRO-2 trained: 100 MB of float32 masters."""
    from transformers import LlamaConfig

    folder = tmp_path / "checkpoint-1"
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
    torch.manual_seed(1)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    indexed, files = {}, [{}, {}]
    for name, weight in weights.items():
        cut = weight.numel() // 3
        for number, part in enumerate((weight.reshape(-1)[:cut], weight.reshape(-1)[cut:])):
            files[number][f"weights/{name}"] = part
        slices = (
            Slice(file=rank_file(0), start=0, size=cut),
            Slice(file=rank_file(1), start=cut, size=weight.numel() - cut),
        )
        indexed[name] = IndexedParameter(
            shape=tuple(weight.shape), dtype="bfloat16", keys={"weights": "float32"}, slices=slices
        )
    for number, tensors in enumerate(files):
        save_file(tensors, folder / rank_file(number))
    (folder / INDEX_FILE).write_text(Index(replicated=False, parameters=indexed).model_dump_json())
    scalars = Scalars(groups=({"lr": 0.1},), schedule={}, scaler=None, states={}, own_keys=())
    (folder / SCALARS_FILE).write_text(scalars.model_dump_json())
    return folder


def test_an_export_takes_the_memory_of_one_file(
    masters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masters are rounded to the model's dtype, and only one file's weights are in memory at a time."""
    from transformers import AutoModelForCausalLM

    in_memory: list[int] = []
    before = own_bytes()

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        in_memory.append(own_bytes() - before)
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    monkeypatch.setattr("trainer.worker.publish_model.FILE_BYTES", 4_000_000)
    consolidate(masters, tmp_path / "out")
    mine = exported_weights(tmp_path / "out")
    total = sum(tensor.nbytes for tensor in mine.values())
    assert len(in_memory) == len(list((tmp_path / "out").glob("*.safetensors"))) > 10
    assert total > 48_000_000
    assert max(in_memory) < 16_000_000
    halves = [load_file(masters / rank_file(rank)) for rank in (0, 1)]
    assert mine.keys() == {name.removeprefix("weights/") for name in halves[0]}
    for name, weight in mine.items():
        whole = torch.cat([half[f"weights/{name}"] for half in halves])
        assert torch.equal(weight.reshape(-1), whole.to(torch.bfloat16))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def own_bytes() -> int:
    """Return this process's memory without mapped files."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def with_adapter(job: Job, adapter: Path) -> tuple[Any, Any]:
    """The model as it was trained: base, quantised or not, and adapter; and the base."""
    from peft import PeftModel

    base = model_source.locate(job, sources.read(job.recipe).train)
    loaded = model.load(base, job.recipe, job.fit)
    return PeftModel.from_pretrained(loaded, str(adapter)), model.load(base, job.recipe, job.fit)


@pytest.mark.parametrize("weights", [(*LORA, "learning_rate=5.0e-2"), QLORA], ids=["lora", "qlora"])
def test_a_merged_model_says_what_base_and_adapter_say(
    small: Small, tmp_path: Path, weights: tuple[str, ...]
) -> None:
    """Also of a quantised base: the logits differ by the rounding to bfloat16, and not by what quantisation took."""
    from transformers import AutoModelForCausalLM

    if "load_in_4bit=true" in weights:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")
    trained = train(make_job(tmp_path / "job", SFT, *FEW, *weights))
    whole = AutoModelForCausalLM.from_pretrained(published(trained, tmp_path / "merged", 2, merge=True))
    before, base = with_adapter(trained.job, model_of(trained, 2))
    expected = logits(before, ids())
    error = (logits(whole, ids()) - expected).abs().max()
    moved = (logits(base, ids()) - expected).abs().max()
    quantised = "load_in_4bit=true" in weights
    assert whole.dtype == (torch.bfloat16 if quantised else torch.float32)
    assert not hasattr(whole.config, "quantization_config")
    assert error < (0.05 if quantised else 1e-4)
    assert error < moved / 10, "the adapter has moved the model by far more than merging did"
    final = AutoModelForCausalLM.from_pretrained(
        trained.final
    )  # merged, because the tiny base exists only in the run
    assert (logits(final, ids()) - logits(whole, ids())).abs().max() == 0


def test_the_wrong_base_would_show(tmp_path: Path) -> None:
    """Merged into the weights that were quantised, an adapter of QLoRA makes another model."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")
    from peft import PeftModel

    trained = train(make_job(tmp_path / "job", SFT, *FEW, *QLORA))
    before, _ = with_adapter(trained.job, model_of(trained, 2))
    base = model_source.locate(trained.job, sources.read(trained.job.recipe).train)
    unquantised = {**trained.job.recipe.model_args, "load_in_4bit": False}
    recipe = trained.job.recipe.model_copy(update={"model_args": unquantised})
    wrong = PeftModel.from_pretrained(model.load(base, recipe, trained.job.fit), str(model_of(trained, 2)))
    assert (logits(wrong.merge_and_unload(), ids()) - logits(before, ids())).abs().max() > 0.05


def test_an_adapter_names_the_base_that_it_was_trained_on(small: Small, tmp_path: Path) -> None:
    """By the recipe's name and revision, wherever this machine had it."""
    base = tmp_path / "base"
    shutil.copytree(small(SFT).final, base)
    overrides = ("init=null", f"model_name_or_path={base}", "model_revision=v1")
    trained = train(make_job(tmp_path / "job", SFT, *FEW, *LORA, *overrides))
    for folder in (trained.final, published(trained, tmp_path / "out", 2)):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (str(base), "v1")
        assert (folder / "adapter_model.safetensors").is_file()
        assert (folder / "chat_template.jinja").is_file()


def test_another_base_is_refused(small: Small, tmp_path: Path) -> None:
    """The base's weights have changed since the training, so the merged model would be wrong."""
    base = tmp_path / "base"
    shutil.copytree(small(SFT).final, base)
    trained = train(make_job(tmp_path / "job", SFT, *FEW, *LORA, "init=null", f"model_name_or_path={base}"))
    shutil.copy2(model_of(small(SFT), 2) / "model.safetensors", base)
    with pytest.raises(ModelError, match="has other weights"):
        published(trained, tmp_path / "out", 2, merge=True)
    assert not (tmp_path / "out").exists()


def test_it_is_pushed(small: Small, tmp_path: Path, hub: Hub) -> None:
    """Every file, to a private repository, with the token in no message."""
    into = published(small(SFT), tmp_path / "out", 4, push="org/name", private=True)
    assert hub.created == [{"name": "name", "organization": "org", "visibility": "private"}]
    assert hub.files == {path.name: path.read_bytes() for path in into.iterdir()}
    assert hub.tokens - {None} == {"Bearer hf_secret"}  # to look at what is public no token is sent


def test_a_hub_that_refuses_is_named(small: Small, tmp_path: Path, hub: Hub) -> None:
    """With the way out and without the token; the folder is there."""
    hub.refuses = True
    with pytest.raises(ModelError, match="it answers 403") as caught:
        published(small(SFT), tmp_path / "out", 4, push="org/name")
    assert "HF_TOKEN" in (caught.value.hint or "")
    assert "hf_secret" not in str(caught.value)
    assert (tmp_path / "out" / "README.md").is_file()


def test_every_weight_of_an_adapter_is_named_as_peft_names_it() -> None:
    """DoRA's magnitudes, adapters of an embedding, and a head that is trained in full have names of their own kind."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **shape))
    targets = ["q_proj", "embed_tokens"]
    config = LoraConfig(r=2, use_dora=True, target_modules=targets, modules_to_save=["lm_head"])
    adapted = get_peft_model(base, config)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("magnitude" in name for name in trained)
    written = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert {adapter_name(name) for name in trained} == set(written)

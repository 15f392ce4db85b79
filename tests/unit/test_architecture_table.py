"""Models' numbers: parameters as published, and where they are looked up."""

from __future__ import annotations

import json
import struct
import urllib.error
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from trainer.architecture import Architecture, known_architecture
from trainer.architecture.lookup import HubAway, architecture_for, find_architecture
from trainer.architecture.table import known_models
from trainer.bucket import open_run
from trainer.bucket.manifest import File, Manifest
from trainer.errors import ModelError, UserError
from trainer.hardware import Shape
from trainer.recipe import DataSource, Mixture, Recipe

PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceH4/mistral-7b-sft-beta": 7_241_732_096,
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    "alignment-handbook/zephyr-7b-sft-qlora": 7_241_732_096,
    "argilla/notus-7b-v1": 7_241_732_096,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}
"""Totals that the Hub shows for the files of https://huggingface.co/<id>."""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_parameters_are_those_published(name: str, total: int) -> None:
    """The parameter count equals the total that the Hub shows, exactly."""
    found = known_architecture(name)
    assert found is not None
    assert found.parameters == total


@pytest.mark.parametrize("name", known_models())
def test_every_model_of_the_table_has_its_numbers(name: str) -> None:
    """Every listed model is found, in upper and lower case."""
    assert known_architecture(name.upper()) == known_architecture(name)
    assert known_architecture(name) is not None


def test_missing_config_keys_have_the_defaults_of_transformers() -> None:
    """By default there are as many key heads as query heads, hidden size / heads per head, a head of its own, and no biases."""
    found = Architecture.from_config("a", CONFIG)
    assert (found.num_key_value_heads, found.head_dim, found.tie_word_embeddings) == (4, 16, False)
    assert found.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 100 * 64 + 64
    gemma = Architecture.from_config("a", {**CONFIG, "model_type": "gemma"})
    assert (gemma.head_dim, gemma.tie_word_embeddings) == (256, True)


def test_an_unsupported_model_type_is_refused() -> None:
    """A mixture of experts would be counted wrongly. The hint lists the supported types."""
    with pytest.raises(ModelError, match="`mixtral` model") as caught:
        Architecture.from_config("a", {**CONFIG, "model_type": "mixtral"})
    assert "mistral" in (caught.value.hint or "")


def test_a_config_without_its_numbers_is_refused() -> None:
    """The message names the missing keys."""
    with pytest.raises(ModelError, match="has no vocab_size"):
        Architecture.from_config("a", {key: value for key, value in CONFIG.items() if key != "vocab_size"})
    with pytest.raises(ModelError, match="hidden_size"):
        Architecture.from_config("a", {**CONFIG, "hidden_size": 0})


# Looking a model up


def recipe(model: str | None, **model_args: Any) -> Recipe:
    return Recipe(
        name="a",
        method="sft",
        model_name_or_path=model,
        init=None if model else "tiny",
        dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
        global_batch_size=1,
        model_args=model_args,
    )


class Hub:
    """A fake Hub with some files. It records the requests."""

    def __init__(self, files: Mapping[str, object], fault: Exception | None = None) -> None:
        self._files = files
        self._fault = fault
        self.asked: list[tuple[str, Mapping[str, str]]] = []

    def __call__(self, url: str, headers: Mapping[str, str]) -> bytes:
        self.asked.append((url, headers))
        if self._fault:
            raise self._fault
        if url not in self._files:
            raise http_error(url, 404)
        return json.dumps(self._files[url]).encode()


def http_error(url: str, code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError(url, code, "no", Message(), None)


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which the cache of the Hub's client is empty."""
    return {"HF_HOME": str(tmp_path / "hub")}


def test_a_tiny_model_has_the_numbers_of_the_recipe(nowhere: dict[str, str]) -> None:
    """The tiny model needs no lookup."""
    found = find_architecture(recipe(None), fetch=Hub({}), environ=nowhere)
    assert (found.hidden_size, found.vocab_size, found.model_type) == (128, 2048, "mistral")


def test_a_model_of_the_table_needs_no_network(nowhere: dict[str, str]) -> None:
    """The table answers without a request, also for an adapter."""
    hub = Hub({})
    found = find_architecture(recipe("alignment-handbook/zephyr-7b-sft-qlora"), fetch=hub, environ=nowhere)
    assert found.parameters == 7_241_732_096
    assert not hub.asked


def test_a_folder_has_its_numbers_in_config_json(tmp_path: Path, nowhere: dict[str, str]) -> None:
    """An adapter's folder leads to the base model that it names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter").mkdir()
    base = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    for name in ("model", "adapter"):
        found = find_architecture(recipe(str(tmp_path / name)), fetch=Hub({}), environ=nowhere)
        assert found.vocab_size == 100


def test_a_cycle_of_adapters_is_an_error(tmp_path: Path, nowhere: dict[str, str]) -> None:
    """The lookup stops after a few adapters, with an error."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelError, match="adapters away from a base model"):
        find_architecture(recipe(str(tmp_path)), fetch=Hub({}), environ=nowhere)


def test_a_broken_config_is_an_error(tmp_path: Path, nowhere: dict[str, str]) -> None:
    """A folder without a config, a broken config, and a missing folder are three errors."""
    with pytest.raises(ModelError, match="neither config"):
        find_architecture(recipe(str(tmp_path)), fetch=Hub({}), environ=nowhere)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        find_architecture(recipe(str(tmp_path)), fetch=Hub({}), environ=nowhere)
    with pytest.raises(ModelError, match="no model folder"):
        find_architecture(recipe(str(tmp_path / "none")), fetch=Hub({}), environ=nowhere)


def test_the_hub_is_asked_for_the_revision_with_the_user_s_token(nowhere: dict[str, str]) -> None:
    """The request goes to the endpoint that the environment names."""
    hub = Hub({"https://mirror.example/org/new/resolve/v2/config.json": CONFIG})
    environ = {**nowhere, "HF_ENDPOINT": "https://mirror.example/", "HF_TOKEN": "secret"}
    found = find_architecture(recipe("org/new", model_revision="v2"), fetch=hub, environ=environ)
    assert found.name == "org/new"
    assert hub.asked == [
        ("https://mirror.example/org/new/resolve/v2/config.json", {"Authorization": "Bearer secret"})
    ]


def test_an_adapter_of_the_hub_leads_to_its_base(nowhere: dict[str, str]) -> None:
    """An adapter has no config.json, so its adapter_config.json names the base."""
    start = "https://huggingface.co/org/adapter/resolve/main/"
    hub = Hub({f"{start}adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}})
    assert find_architecture(recipe("org/adapter"), fetch=hub, environ=nowhere).vocab_size == 151936


def test_a_cached_model_needs_no_request(tmp_path: Path) -> None:
    """The cache of the Hub's client is read before the Hub."""
    snapshot = tmp_path / "hub" / "models--org--new" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    hub = Hub({})
    assert (
        find_architecture(recipe("org/new"), fetch=hub, environ={"HF_HOME": str(tmp_path)}).vocab_size == 100
    )
    assert not hub.asked


@pytest.mark.parametrize(
    ("fault", "words", "kind"),
    [
        (http_error("u", 401), "denies access to org/new", ModelError),
        (http_error("u", 400), "answers 400", ModelError),
        (http_error("u", 503), "answers 503", HubAway),
        (http_error("u", 429), "answers 429", HubAway),
        (TimeoutError("timed out"), "timed out", HubAway),
        (OSError("no such host"), "no such host", HubAway),
    ],
    ids=["gated", "refused", "broken", "busy", "slow", "nowhere"],
)
def test_a_hub_that_does_not_answer_is_one_clear_error(
    fault: Exception, words: str, kind: type[UserError], nowhere: dict[str, str]
) -> None:
    """Every failure has a hint. A temporary failure has another class than a permanent one."""
    with pytest.raises(kind, match=words) as caught:
        find_architecture(recipe("org/new"), fetch=Hub({}, fault), environ=nowhere)
    assert caught.value.hint


def test_a_token_is_in_no_message(nowhere: dict[str, str]) -> None:
    """An error of the network does not reveal the token."""
    environ = {**nowhere, "HF_TOKEN": "hf_secret"}
    with pytest.raises(HubAway) as caught:
        find_architecture(recipe("org/new"), fetch=Hub({}, OSError("down")), environ=environ)
    assert "hf_secret" not in str(caught.value)


def test_an_offline_lookup_makes_no_request(nowhere: dict[str, str]) -> None:
    """The environment or the caller can turn requests off."""
    hub = Hub({})
    for settings in ({"online": False}, {"environ": {**nowhere, "HF_HUB_OFFLINE": "1"}}):
        with pytest.raises(ModelError, match="does not ask the Hub"):
            find_architecture(recipe("org/new"), **{"fetch": hub, "environ": nowhere, **settings})  # type: ignore[arg-type]
    assert not hub.asked
    with pytest.raises(ModelError, match="reads no bucket"):
        find_architecture(recipe("s3://bucket/run/final"), online=False, fetch=hub, environ=nowhere)


def test_a_run_s_model_is_looked_up_in_its_bucket(tmp_path: Path, nowhere: dict[str, str]) -> None:
    """The files of the run's final commit are read. A run without one is an error."""
    uri = (tmp_path / "runs").as_uri()
    bucket = open_run(uri, "sft")
    with pytest.raises(ModelError, match="no final model yet"):
        find_architecture(recipe(f"{uri}/sft/final"), environ=nowhere)
    with pytest.raises(ModelError, match="is not a run's model"):
        find_architecture(recipe(f"{uri}/sft/other"), environ=nowhere)
    data = json.dumps(CONFIG).encode()
    bucket.put("final/config.json", data)
    file = File(path="config.json", size=len(data), xxh3="0" * 32)
    manifest = Manifest(
        run_id="sft",
        attempt=1,
        step=1,
        kind="final",
        created=datetime.now(UTC),
        recipe="",
        details={},
        files=(file,),
    )
    bucket.put(manifest.key, manifest.model_dump_json().encode())
    assert find_architecture(recipe(f"{uri}/sft/final"), environ=nowhere).vocab_size == 100


def test_an_unknown_model_is_an_error_only_with_gpus() -> None:
    """On a CPU it trains without a prediction. On GPUs, which cost money, it is an error."""
    cpu = Shape(accelerator=None, count=0, memory_gib=None, cores=1, host_memory_gib=8.0, node="a")
    assert architecture_for(recipe("/none/here"), cpu) is None
    gpus = cpu.model_copy(update={"accelerator": "A100", "count": 8, "memory_gib": 40.0})
    with pytest.raises(UserError):
        architecture_for(recipe("/none/here"), gpus)


# GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(path: Path, kind: str, numbers: Mapping[str, int], *, words: int, head: bool) -> Path:
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text(kind)]
    pairs += [text(f"{kind}.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    tokens = b"".join(text(str(number)) for number in range(words))
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, words) + tokens)
    pairs.append(text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0.5, 1))
    tensors = ["token_embd.weight", *(["output.weight"] if head else [])]
    infos = [text(name) + struct.pack("<IQQIQ", 2, 8, 8, 0, 0) for name in tensors]
    counts = struct.pack("<IQQ", 3, len(infos), len(pairs))
    path.write_bytes(b"GGUF" + counts + b"".join(pairs) + b"".join(infos))
    return path


@pytest.mark.parametrize("head", [True, False], ids=["own head", "tied"])
def test_a_gguf_file_has_its_numbers_in_the_header(tmp_path: Path, head: bool) -> None:
    """The list of tokens gives the vocabulary. A model without an output matrix has a tied head."""
    numbers = {
        "embedding_length": 64,
        "feed_forward_length": 128,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
    }
    file = gguf_file(tmp_path / "model.gguf", "gemma3", numbers, words=100, head=head)
    found = find_architecture(recipe(str(file)))
    assert found == Architecture(
        name=str(file),
        model_type="gemma3_text",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=100,
        tie_word_embeddings=not head,
    )


def test_a_broken_gguf_file_is_an_error(tmp_path: Path) -> None:
    """Another format, half a file, and a missing file are errors."""
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="GGUF"):
        find_architecture(recipe(str(tmp_path / "model.gguf")))
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(ModelError, match="cannot be read"):
        find_architecture(recipe(str(tmp_path / "model.gguf")))
    with pytest.raises(ModelError, match="cannot be read"):
        find_architecture(recipe(str(tmp_path / "none.gguf")))

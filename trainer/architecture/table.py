"""Architectures by Hub id, for use without a network. Each row is taken from https://huggingface.co/<id>, `config.json`.

A test compares the parameter counts with the totals that the Hub shows for the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from trainer.architecture.architecture import Architecture


class _Row(NamedTuple):
    ids: tuple[str, ...]
    """Models with these numbers. The first one was trained from scratch."""
    kind: str
    hidden: int
    inner: int
    layers: int
    heads: tuple[int, int]
    """Heads of queries, and heads of keys and values."""
    vocabulary: int
    tied: bool = False
    head: int | None = None
    """Dimension of a head, if it is not hidden size / heads."""
    dtype: str = "bfloat16"


MISTRAL = (
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "HuggingFaceH4/mistral-7b-sft-alpha",
    "HuggingFaceH4/mistral-7b-sft-beta",
    "HuggingFaceH4/zephyr-7b-alpha",
    "HuggingFaceH4/zephyr-7b-beta",
    "alignment-handbook/zephyr-7b-sft-full",
    "alignment-handbook/zephyr-7b-sft-qlora",
    "argilla/notus-7b-v1",
)
"""Adapters have their base model's numbers, because an adapter is merged before it is trained further."""
LLAMA3 = (
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
)


def _with_chat(*ids: str, suffix: str) -> tuple[str, ...]:
    """Return the ids of base models, each followed by the id of its chat model."""
    return tuple(name for base in ids for name in (base, base + suffix))


ROWS = (
    _Row(MISTRAL, "mistral", 4096, 14336, 32, (32, 8), 32000),
    _Row(
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        "mistral",
        4096,
        14336,
        32,
        (32, 8),
        32768,
    ),
    _Row(
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
        "llama",
        4096,
        11008,
        32,
        (32, 32),
        32000,
        dtype="float16",
    ),
    _Row(LLAMA3, "llama", 4096, 14336, 32, (32, 8), 128256),
    _Row(
        _with_chat("meta-llama/Llama-3.2-1B", suffix="-Instruct"),
        "llama",
        2048,
        8192,
        16,
        (32, 8),
        128256,
        tied=True,
    ),
    _Row(
        _with_chat("meta-llama/Llama-3.2-3B", suffix="-Instruct"),
        "llama",
        3072,
        8192,
        28,
        (24, 8),
        128256,
        tied=True,
    ),
    _Row(("TinyLlama/TinyLlama-1.1B-Chat-v1.0",), "llama", 2048, 5632, 22, (32, 4), 32000),
    _Row(
        _with_chat("HuggingFaceTB/SmolLM2-135M", suffix="-Instruct"),
        "llama",
        576,
        1536,
        30,
        (9, 3),
        49152,
        tied=True,
    ),
    _Row(
        _with_chat("HuggingFaceTB/SmolLM2-360M", suffix="-Instruct"),
        "llama",
        960,
        2560,
        32,
        (15, 5),
        49152,
        tied=True,
    ),
    _Row(
        _with_chat("HuggingFaceTB/SmolLM2-1.7B", suffix="-Instruct"),
        "llama",
        2048,
        8192,
        24,
        (32, 32),
        49152,
        tied=True,
    ),
    _Row(
        _with_chat("google/gemma-2b", suffix="-it"),
        "gemma",
        2048,
        16384,
        18,
        (8, 1),
        256000,
        tied=True,
        head=256,
    ),
    _Row(
        _with_chat("google/gemma-7b", suffix="-it"),
        "gemma",
        3072,
        24576,
        28,
        (16, 16),
        256000,
        tied=True,
        head=256,
    ),
    _Row(
        _with_chat("google/gemma-3-270m", suffix="-it"),
        "gemma3_text",
        640,
        2048,
        18,
        (4, 1),
        262144,
        tied=True,
        head=256,
    ),
    _Row(
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
        "gemma3_text",
        1152,
        6912,
        26,
        (4, 1),
        262144,
        tied=True,
        head=256,
    ),
    _Row(
        _with_chat("Qwen/Qwen2.5-0.5B", suffix="-Instruct"),
        "qwen2",
        896,
        4864,
        24,
        (14, 2),
        151936,
        tied=True,
    ),
    _Row(
        _with_chat("Qwen/Qwen2.5-1.5B", suffix="-Instruct"),
        "qwen2",
        1536,
        8960,
        28,
        (12, 2),
        151936,
        tied=True,
    ),
    _Row(
        _with_chat("Qwen/Qwen2.5-3B", suffix="-Instruct"),
        "qwen2",
        2048,
        11008,
        36,
        (16, 2),
        151936,
        tied=True,
    ),
    _Row(_with_chat("Qwen/Qwen2.5-7B", suffix="-Instruct"), "qwen2", 3584, 18944, 28, (28, 4), 152064),
    _Row(_with_chat("Qwen/Qwen2.5-14B", suffix="-Instruct"), "qwen2", 5120, 13824, 48, (40, 8), 152064),
    _Row(
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"),
        "qwen3",
        1024,
        3072,
        28,
        (16, 8),
        151936,
        tied=True,
        head=128,
    ),
    _Row(
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"),
        "qwen3",
        2048,
        6144,
        28,
        (16, 8),
        151936,
        tied=True,
        head=128,
    ),
    _Row(
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base"), "qwen3", 2560, 9728, 36, (32, 8), 151936, tied=True, head=128
    ),
    _Row(("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"), "qwen3", 4096, 12288, 36, (32, 8), 151936, head=128),
    _Row(("Qwen/Qwen3-14B", "Qwen/Qwen3-14B-Base"), "qwen3", 5120, 17408, 40, (40, 8), 151936, head=128),
)


def known_architecture(model: str) -> Architecture | None:
    """Return the architecture of a Hub id, in upper or lower case. None if the table does not have it."""
    return _by_id().get(model.casefold())


def known_models() -> tuple[str, ...]:
    """Return the Hub ids of the table."""
    return tuple(name for row in ROWS for name in row.ids)


@cache
def _by_id() -> dict[str, Architecture]:
    return dict(_entries())


def _entries() -> Iterator[tuple[str, Architecture]]:
    for row in ROWS:
        for name in row.ids:
            yield name.casefold(), Architecture.from_config(name, config_of(row))


def config_of(row: _Row) -> dict[str, object]:
    """Return the row in the form of a `config.json`."""
    head = {"head_dim": row.head} if row.head else {}
    return {
        "model_type": row.kind,
        "hidden_size": row.hidden,
        "intermediate_size": row.inner,
        "num_hidden_layers": row.layers,
        "num_attention_heads": row.heads[0],
        "num_key_value_heads": row.heads[1],
        "vocab_size": row.vocabulary,
        "tie_word_embeddings": row.tied,
        "dtype": row.dtype,
        **head,
    }

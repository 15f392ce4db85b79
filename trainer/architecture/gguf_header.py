"""Read a model's numbers from the header of its GGUF file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import ModelError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
"""Type codes of values."""
NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Type codes of numbers, and their formats for `struct`."""
KINDS = {"gemma3": "gemma3_text"}
"""Architectures in GGUF, and their names in Transformers where these differ.

Mistral's models are `llama` in GGUF. Both have the same parameter counts.
"""
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
"""Keys of the header, and their names in a `config.json`."""
LENGTH = "<length>"
"""Suffix under which the length of an array is stored."""
HEAD = "output.weight"
"""The tensor that exists only if the head is not tied to the embedding."""


def config(file: Path) -> dict[str, Any]:
    """Return the content that the model's `config.json` would have.

    Raises:
        ModelError: the file does not exist, or is not a GGUF file.
    """
    try:
        with file.open("rb") as stream:
            values, tensors = _header(stream)
    except (OSError, struct.error, UnicodeDecodeError, KeyError) as error:
        raise ModelError(
            f"{file} cannot be read as a GGUF file: {error}",
            hint="check the path, or download the file again",
        ) from error
    kind = str(values.get("general.architecture"))
    found = {ours: values[f"{kind}.{key}"] for key, ours in KEYS.items() if f"{kind}.{key}" in values}
    return {
        "model_type": KINDS.get(kind, kind),
        "vocab_size": values.get(f"tokenizer.ggml.tokens{LENGTH}"),
        "tie_word_embeddings": HEAD not in tensors,
        **found,
    }


def _header(stream: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Return the header's keys with their values, and the names of the tensors. For an array, only its length is kept."""
    if stream.read(4) != MAGIC:
        raise KeyError("it does not start with GGUF")
    _number(stream, "<I")  # version
    tensors, pairs = _number(stream, "<Q"), _number(stream, "<Q")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key, kind = _text(stream), _number(stream, "<I")
        value = _value(stream, kind)
        values[key + LENGTH if kind == ARRAY else key] = value
    return values, {_tensor(stream) for _ in range(tensors)}


def _value(stream: BinaryIO, kind: int) -> Any:
    """Read a value. Skip the items of an array, and return its length."""
    if kind == STRING:
        return _text(stream)
    if kind != ARRAY:
        return _number(stream, NUMBERS[kind])
    inner, length = _number(stream, "<I"), _number(stream, "<Q")
    if inner in NUMBERS:
        stream.seek(length * struct.calcsize(NUMBERS[inner]), 1)
    else:
        for _ in range(length):
            _skip(stream) if inner == STRING else _value(stream, inner)
    return length


def _tensor(stream: BinaryIO) -> str:
    name = _text(stream)
    dimensions = _number(stream, "<I")
    stream.seek(8 * dimensions + 4 + 8, 1)  # sizes, type, offset
    return name


def _text(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "<Q")).decode()


def _skip(stream: BinaryIO) -> None:
    stream.seek(_number(stream, "<Q"), 1)


def _number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]

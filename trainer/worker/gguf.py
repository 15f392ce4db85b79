"""GGUF files, unpacked once into a folder that every library can load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import platformdirs
import xxhash

from trainer.errors import ModelError

log = logging.getLogger(__name__)
BLOCK_BYTES = 1 << 22


def converted(file: Path, dtype: str) -> Path:
    """The folder that `file` was unpacked to, in `dtype`; made if it is not in the cache, in a minute or two.

    Raises:
        ModelError: there is no such file, or Transformers cannot read it.
    """
    from trainer.worker.model import once

    if not file.is_file():
        raise ModelError(f"there is no file {file}")
    folder = platformdirs.user_cache_path("aeolus") / "models" / f"{_checksum(file)}-{dtype}"
    return once(folder, lambda into: _convert(file.resolve(), dtype, into))


def _checksum(file: Path) -> str:
    total = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def _convert(file: Path, dtype: str, into: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.worker.model import explained

    log.info("unpacking %s as %s, once for this machine", file.name, dtype)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        AutoTokenizer.from_pretrained(**place).save_pretrained(into)
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, quantization_config=_unpacking(file)
        )
        model.save_pretrained(into)
    except Exception as error:  # a broken file surfaces as any of a dozen errors
        raise explained(str(file), error) from error


def _unpacking(file: Path) -> Any:
    """Transformers otherwise keeps the weights in GGUF's blocks, which can neither be trained nor saved."""
    from transformers.utils.quantization_config import GgufConfig

    return GgufConfig(gguf_file=file.name, dequantize=True)

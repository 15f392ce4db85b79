"""Where a model comes from: the Hub, a folder, a GGUF file, an adapter, or a tiny model made here."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import xxhash

from trainer.errors import ModelError, RecipeError
from trainer.job import Job
from trainer.recipe import Recipe
from trainer.worker.failures import explained
from trainer.worker.sources import Row

log = logging.getLogger(__name__)
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"  # Mistral's special tokens
TINY_INITIALIZER_RANGE = 0.08
"""About 1 / sqrt(hidden size). The usual 0.02 suits models 30 times as wide; a tiny one would learn for minutes."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
"""Patterns of an adapter's and its tokenizer's files on the Hub; checkpoints and logs beside them are not fetched."""
BLOCK_BYTES = 1 << 22


class Base(NamedTuple):
    """The model that the policy and the reference are loaded from, at every attempt."""

    path: str
    """Local folder or Hub id."""
    name: str | None
    """The name under which others can find it; None if it exists only in this attempt's folder."""


def locate(job: Job, rows: Iterable[Row]) -> Base:
    """Find the recipe's model, or make the tiny one that it describes; `rows` train a tiny model's tokenizer.

    Raises:
        ModelError: the model does not exist or cannot be read.
        RecipeError: the recipe names no model.
        Unavailable: the Hub does not answer.
    """
    recipe = job.recipe
    if recipe.init == "tiny":
        return Base(str(make_once(job.work / "model", lambda into: make_tiny(into, recipe, rows))), None)
    path, name = job.model or recipe.model_name_or_path, recipe.model_name_or_path
    if path is None:
        raise RecipeError("the recipe names no model", hint="set `model_name_or_path`, or `init: tiny`")
    if path.endswith(".gguf"):
        return Base(str(converted(Path(path), dtype_name(recipe))), name)
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local, name, job)
    if local.is_absolute() or path.startswith(("~", ".")) or path.count("/") > 1:
        raise ModelError(f"there is no model folder {path}")
    if adapter := from_hub(path, str(hub_arguments(recipe)["revision"])):
        return _folder(adapter, name, job)
    return Base(path, name)


def hub_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that choose a revision and allow remote code."""
    return {
        "revision": recipe.model_args.get("model_revision", "main"),
        "trust_remote_code": bool(
            recipe.model_args.get("trust_remote_code", recipe.trainer_args.get("trust_remote_code", False))
        ),
    }


def dtype_name(recipe: Recipe) -> str:
    """Return the dtype to load the model in, `auto` included."""
    return str(recipe.model_args.get("dtype") or "float32")  # TRL's default


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist, `make` fills it, and it appears only when complete.

    One rank of a node makes it while the others wait, because all ranks at once would each hold a model in memory.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the process that holds it ends
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(partial)
            partial.chmod(0o755)  # mkdtemp makes it readable by this user only
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def make_tiny(into: Path, recipe: Recipe, rows: Iterable[Row]) -> None:
    """Write a small Mistral with random weights, and a byte-level BPE tokenizer trained on the rows' text."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = _train_tokenizer(_texts(rows), recipe.tiny.vocab_size)
    config = MistralConfig(
        **{**recipe.tiny.model_dump(), "vocab_size": len(tokenizer)},
        sliding_window=None,
        initializer_range=TINY_INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        MistralForCausalLM(config).save_pretrained(into)
    tokenizer.save_pretrained(into)


def from_hub(name: str, revision: str, *, cache: Path | None = None) -> Path | None:
    """Download the adapter `name` and return its folder; return None if `name` is a whole model.

    Raises:
        ModelError: it does not exist, or is gated.
        Unavailable: the Hub does not answer.
    """
    from huggingface_hub import (  # type: ignore[import-not-found,unused-ignore]
        hf_hub_download,
        snapshot_download,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import (  # type: ignore[import-not-found,unused-ignore]
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    try:
        hf_hub_download(name, ADAPTER_CONFIG, revision=revision, cache_dir=cache)
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=ADAPTER_FILES, ignore_patterns="*/*"
        )
    except LocalEntryNotFoundError as error:
        # The Hub is unreachable, but a whole model may be in the cache.
        if isinstance(try_to_load_from_cache(name, "config.json", cache, revision), str):
            return None
        raise explained(name, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise explained(name, error) from error
    return Path(folder)


def converted(file: Path, dtype: str) -> Path:
    """Return the folder that a GGUF file was unpacked to, in `dtype`; unpacking takes a minute or two, once a machine.

    Raises:
        ModelError: the file does not exist, or Transformers cannot read it.
    """
    if not file.is_file():
        raise ModelError(f"there is no file {file}")
    folder = platformdirs.user_cache_path("aeolus") / "models" / f"{_checksum(file)}-{dtype}"
    return make_once(folder, lambda into: _convert(file.resolve(), dtype, into))


def _folder(folder: Path, name: str | None, job: Job) -> Base:
    """Return the model in a local folder; an adapter is merged into the base that it names."""
    if (folder / ADAPTER_CONFIG).is_file():
        return Base(str(make_once(job.work / "merged", lambda into: _merge_into_base(folder, into))), None)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", hint="name a folder that `save_pretrained` wrote")
    return Base(str(folder), name)


def _merge_into_base(adapter: Path, into: Path) -> None:
    """Write the whole model of an adapter and the base that it names, with the adapter's tokenizer."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    try:
        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype="auto")
        model.merge_and_unload().save_pretrained(into)
        if (adapter / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(str(adapter)).save_pretrained(into)
    except (OSError, ValueError) as error:
        raise explained(str(adapter), error) from error


def _train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=END
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in rows, columns and messages, with the marker that a chat template puts before a turn."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if "role" in value:
            yield f"<|{value['role']}|>\n"
        for key in sorted(value):
            yield from _texts(value[key]) if key != "role" else ()
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def _checksum(file: Path) -> str:
    total = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def _convert(file: Path, dtype: str, into: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as `save_pretrained` does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("unpacking %s as %s, once for this machine", file.name, dtype)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        AutoTokenizer.from_pretrained(**place).save_pretrained(into)
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, quantization_config=_unpacking(file)
        )
        model.save_pretrained(into)
    except Exception as error:  # a broken file surfaces as one of many error types
        raise explained(str(file), error) from error


def _unpacking(file: Path) -> Any:
    """Return a config that makes Transformers dequantise: weights in GGUF's blocks can be neither trained nor saved."""
    from transformers.utils.quantization_config import GgufConfig

    return GgufConfig(gguf_file=file.name, dequantize=True)

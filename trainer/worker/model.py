"""The model that a run begins with: found or made, loaded, described."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.errors import ModelError, RecipeError, Unavailable, UserError
from trainer.fit import Fit
from trainer.job import Job
from trainer.memory.precision import half_precision, trains_in_float32
from trainer.recipe import Recipe
from trainer.worker import adapters, quantised
from trainer.worker.reach import out_of_reach
from trainer.worker.sources import Row

log = logging.getLogger(__name__)
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"  # Mistral's special tokens
TINY_INITIALIZER_RANGE = 0.08
"""About 1 / sqrt(hidden size). With the usual 0.02, made for models 30 times as wide, a tiny one learns for minutes."""
FLASH_ATTENTION = "flash_attention_2"
FLASH_ATTENTION_CAPABILITY = (8, 0)
"""Ampere, the oldest CUDA architecture that FlashAttention 2 supports."""


class Base(NamedTuple):
    """What the policy and the reference are both loaded from, at every attempt."""

    path: str
    """Local folder or Hub id."""
    name: str | None
    """How others can find it; None if it lives in this attempt's folder only."""


def locate(job: Job, rows: Iterable[Row]) -> Base:
    """Find the recipe's model, or make the one it describes; `rows` teach a tiny model's tokenizer.

    Raises:
        ModelError: it is not there.
    """
    recipe = job.recipe
    if recipe.init == "tiny":
        return Base(str(once(job.work / "model", lambda into: make_tiny(into, recipe, rows))), None)
    path, name = job.model or recipe.model_name_or_path, recipe.model_name_or_path
    if path is None:
        raise RecipeError("the recipe names no model", hint="set `model_name_or_path`, or `init: tiny`")
    if path.endswith(".gguf"):
        from trainer.worker.gguf import converted

        return Base(str(converted(Path(path), dtype_name(recipe))), name)
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local, name, job)
    if local.is_absolute() or path.startswith(("~", ".")) or path.count("/") > 1:
        raise ModelError(f"there is no model folder {path}")
    if adapter := adapters.from_hub(path, str(hub_arguments(recipe)["revision"])):
        return _folder(adapter, name, job)
    return Base(path, name)


def _folder(folder: Path, name: str | None, job: Job) -> Base:
    if (folder / "adapter_config.json").is_file():
        from trainer.worker.export import merge

        return Base(str(once(job.work / "merged", lambda into: merge(folder, into))), None)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", hint="name a folder that `save_pretrained` wrote")
    return Base(str(folder), name)


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` unless it is there: whole or not at all, by one rank of a node while the others wait.

    All at once would each hold a model for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it with the process that holds it
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(partial)
            partial.chmod(0o755)  # mkdtemp makes it for us alone
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(base: Base, recipe: Recipe, fit: Fit, *, trained: bool = True) -> Any:
    """A causal language model with its weights, on the CPU (quantised: where it is to run).

    One whose weights are all `trained` is in float32 where mixed precision needs it so.

    Raises:
        ModelError: missing, broken or gated.
        Unavailable: the Hub does not answer.
    """
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "dtype": "float32" if trained and _keeps_float32(recipe, fit) else dtype_name(recipe),
        "attn_implementation": attention(recipe, fit),
        **hub_arguments(recipe),
    }
    if quantization := quantised.config(recipe, dtype_name(recipe)):
        settings["quantization_config"] = quantization
        settings["device_map"] = {"": "cpu" if fit.use_cpu else int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, **settings)
    except Exception as error:  # a broken file surfaces as any of a dozen libraries' errors
        raise explained(base.path, error) from error
    if quantization:
        quantised.keep_layout(model)
    return model


def explained(path: str, error: Exception) -> UserError:
    """What a failed load means to a user: `ModelError`, or `Unavailable` if the Hub may answer later."""
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    everything = f"{error!r} {error.__cause__!r}".lower()
    if "gated" in everything or "401" in everything or "403" in everything:
        hint = "it is gated: accept its terms on the Hub, and pass your token as $HF_TOKEN"
    elif Path(path).exists():
        hint = "the folder's files are damaged, or of an architecture that Transformers does not know"
    else:
        hint = "neither a folder here nor a model of the Hub that we can reach from this machine"
    if out_of_reach(error):
        return Unavailable(f"{path} cannot be loaded for now: {text}", hint=hint)
    return ModelError(f"{path} cannot be loaded: {text}", hint=hint)


def hub_arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "revision": recipe.model_args.get("model_revision", "main"),
        "trust_remote_code": bool(
            recipe.model_args.get("trust_remote_code", recipe.trainer_args.get("trust_remote_code", False))
        ),
    }


def dtype_name(recipe: Recipe) -> str:
    return str(recipe.model_args.get("dtype") or "float32")  # TRL's default


def _keeps_float32(recipe: Recipe, fit: Fit) -> bool:
    if fit.use_cpu:
        return False
    from trainer.worker.arguments import has_bf16

    has_half = half_precision(recipe, has_bf16=has_bf16(fit)) is not None
    return trains_in_float32(recipe, fit.engine, has_half=has_half)


def attention(recipe: Recipe, fit: Fit) -> str | None:
    """The recipe's choice, or the fit's FlashAttention; `sdpa` where that cannot run; None leaves it to Transformers."""
    said: str | None = recipe.model_args.get("attn_implementation")
    wanted = said if said or fit.use_cpu or fit.attention != FLASH_ATTENTION else FLASH_ATTENTION
    if wanted != FLASH_ATTENTION or (reason := _no_flash_attention(fit)) is None:
        return wanted
    log.info("attention is sdpa, not %s: %s", FLASH_ATTENTION, reason)
    return "sdpa" if said else None


def _no_flash_attention(fit: Fit) -> str | None:
    import torch
    from transformers.utils import is_flash_attn_2_available

    if fit.use_cpu or not torch.cuda.is_available():
        return "there is no CUDA device"
    if fit.attention != FLASH_ATTENTION:
        return "it knows no float32"
    if torch.cuda.get_device_capability() < FLASH_ATTENTION_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    return None if is_flash_attn_2_available() else "the package flash-attn is not installed"


def lora(recipe: Recipe) -> Any:
    """The recipe's `LoraConfig`; None to train every weight."""
    from trl import ModelConfig, get_peft_config

    try:
        return get_peft_config(ModelConfig(**recipe.model_args))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the recipe's LoRA settings cannot be used: {error}") from error


def digest(model: Any, recipe: Recipe) -> str:
    """xxh3_128 over every weight's name and bytes; what ZeRO 3 has cut is gathered, a weight at a time.

    In half precision: whether weights are loaded in it or in float32 is the engine's to say, and the hardware's.
    """
    import torch

    is_float16 = recipe.trainer_args.get("fp16") or dtype_name(recipe) == "float16"
    half = torch.float16 if is_float16 else torch.bfloat16
    total = xxhash.xxh3_128()
    cut = {name: weight for name, weight in model.named_parameters() if hasattr(weight, "ds_id")}
    for name, kept in sorted(model.state_dict().items()):
        tensor = _gathered(cut[name]) if name in cut else kept
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.to(half) if tensor.is_floating_point() else tensor
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _gathered(weight: Any) -> Any:
    """A copy on the host; every rank has to ask for it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([weight]):
        return weight.detach().cpu().clone()


def make_tiny(into: Path, recipe: Recipe, rows: Iterable[Row]) -> None:
    """A small Mistral with random weights, and a byte-level BPE of the training rows' text."""
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
    """Every text in rows, columns and messages, with the marks that a chat template puts before a turn."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if "role" in value:
            yield f"<|{value['role']}|>\n"
        for key in sorted(value):
            yield from _texts(value[key]) if key != "role" else ()
    elif isinstance(value, Iterable):
        for each in value:
            yield from _texts(each)

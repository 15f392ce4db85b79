"""The weights of a committed checkpoint as the files of a model, whichever engine wrote it; on the CPU, in little memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ModelError, UserError
from trainer.staged import IDENTITY_FILE
from trainer.worker.reshard.dcp_folder import INDEX, MODEL, OPTIMIZER, Folder

log = logging.getLogger(__name__)
SHARD = "5GB"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "lm_head.weight"
OF_THE_RUN = (
    "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin", IDENTITY_FILE,
    "deepspeed.json", "latest", "global_step*", "fsdp.json", MODEL, OPTIMIZER, "zero_to_*.py", "*.partial", "README.md",
)  # fmt: skip
"""What a checkpoint has and a model has not."""


def consolidate(checkpoint: Path, into: Path) -> None:
    """Write the model or adapter that a checkpoint holds, with its tokenizer and configs.

    Raises:
        UserError: the checkpoint has no weights that are known here.
    """
    shutil.copytree(checkpoint, into, ignore=shutil.ignore_patterns(*OF_THE_RUN), dirs_exist_ok=True)
    if (checkpoint / "latest").is_file():
        _write(checkpoint, into, _parts_of_deepspeed)
    elif (checkpoint / MODEL / INDEX).is_file():
        _write(checkpoint, into, _chunks_of_fsdp)
    elif not any(into.glob("*.safetensors")):
        raise UserError(f"the checkpoint {checkpoint.name} holds no weights as safetensors")
    if not (into / ADAPTER_CONFIG).is_file():
        _add_generation_config(into)


def _write(checkpoint: Path, into: Path, lazy: Callable[..., dict[str, Any]]) -> None:
    """What the ranks wrote is read through memory maps, and put together file by file."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards  # type: ignore[import-not-found,unused-ignore]
    from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]

    adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    weights = lazy(checkpoint, trained_only=adapter)
    dtype = getattr(torch, _dtype(checkpoint)) if not adapter else None
    if adapter:
        weights = {_adapter_name(name): weight for name, weight in weights.items()}
    like = {
        name: torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
        for name, weight in weights.items()
    }
    pattern = ADAPTER if adapter else "model{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(
        like, filename_pattern=pattern, max_shard_size="1TB" if adapter else SHARD
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: weights[name].contiguous().to(dtype or weights[name].dtype) for name in names}
        save_file(tensors, into / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (into / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _parts_of_deepspeed(checkpoint: Path, *, trained_only: bool) -> dict[str, Any]:
    """By name, each to be read by `contiguous()`; of weights that are tied the first."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    os.environ["TQDM_DISABLE"] = "1"
    with contextlib.redirect_stdout(None):
        found = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), exclude_frozen_parameters=trained_only, lazy_mode=True
        )
    return dict(_first_of_each(found.items()))


class _Stored(NamedTuple):
    """A tensor that is read by `contiguous()`."""

    folder: Folder
    name: str

    @property
    def shape(self) -> Any:
        return self.folder.tensors[self.name].size

    @property
    def dtype(self) -> Any:
        return self.folder.tensors[self.name].properties.dtype

    def contiguous(self) -> Any:
        return self.folder.tensor(self.name)


def _chunks_of_fsdp(checkpoint: Path, **_: bool) -> dict[str, Any]:
    """By name, each to be read by `contiguous()`; of an adapter nothing else is there. A head that is the embedding once
    more is written twice by FSDP, and not here.
    """
    folder = Folder(checkpoint / MODEL)
    found = {folder.paths[name][-1]: _Stored(folder, name) for name in folder.tensors}
    if json.loads((checkpoint / "config.json").read_text()).get("tie_word_embeddings"):
        found.pop(HEAD, None)
    return found


def _first_of_each(weights: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    seen: set[int] = set()
    for name, weight in weights:
        if id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight


def _adapter_name(name: str) -> str:
    """As PEFT saves it: without the adapter's own name, and of modules trained whole without their wrapper's."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _dtype(checkpoint: Path) -> str:
    """Of the model as it was trained; the parts are its float32 masters."""
    config = json.loads((checkpoint / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _add_generation_config(into: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    if (into / "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_model_config(AutoConfig.from_pretrained(into)).save_pretrained(into)
    except (OSError, ValueError) as error:
        raise ModelError(f"{into} has no config that Transformers knows: {error}") from error

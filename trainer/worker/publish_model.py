"""Turns a committed checkpoint into a model for others: `python -m trainer.worker.publish_model PUBLISH_JSON`.

It combines the parts that an engine's ranks wrote, merges an adapter if requested, and uploads the model to the Hub.
It runs on the CPU, and reads weights through memory maps, so it needs little memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ModelError, UserError
from trainer.files import write_atomically
from trainer.job import Job, Outcome, Publish
from trainer.staged import IDENTITY_FILE
from trainer.worker import model_source
from trainer.worker.failures import http_status
from trainer.worker.model_source import Base
from trainer.worker.reshard.fsdp_checkpoint import INDEX, MODEL, OPTIMIZER, DcpFolder

log = logging.getLogger("trainer.worker.publish_model")
SHARD = "5GB"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "lm_head.weight"
CHECKPOINT_ONLY = (
    "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin", IDENTITY_FILE,
    "deepspeed.json", "latest", "global_step*", "fsdp.json", MODEL, OPTIMIZER, "zero_to_*.py", "*.partial", "README.md",
)  # fmt: skip
"""Files of a checkpoint that do not belong to a model."""


def publish(task: Publish) -> None:
    """Write the model folder `task.into`, and push it to the Hub if requested.

    Raises:
        UserError: the checkpoint, the base model or the Hub's repository cannot be used.
    """
    work = task.into.with_name(f".{task.into.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    consolidate(task.source, work)
    if (work / ADAPTER_CONFIG).is_file():
        _name_base(work, task.job)
        if task.merge:
            _merge(task, work)
    elif task.merge:
        log.info("there is no adapter to merge: every weight was trained")
    (work / "README.md").write_text(task.card)
    work.rename(task.into)
    if task.push:
        _push(task, task.push)


def consolidate(checkpoint: Path, into: Path) -> None:
    """Write the model or adapter of a checkpoint of any engine, with its tokenizer and configs.

    Raises:
        UserError: the checkpoint has no weights in a known format.
    """
    shutil.copytree(checkpoint, into, ignore=shutil.ignore_patterns(*CHECKPOINT_ONLY), dirs_exist_ok=True)
    if (checkpoint / "latest").is_file():
        _write_weights(checkpoint, into, _deepspeed_weights)
    elif (checkpoint / MODEL / INDEX).is_file():
        _write_weights(checkpoint, into, _fsdp_weights)
    elif not any(into.glob("*.safetensors")):
        raise UserError(f"the checkpoint {checkpoint.name} holds no weights as safetensors")
    if not (into / ADAPTER_CONFIG).is_file():
        _add_generation_config(into)


def _write_weights(checkpoint: Path, into: Path, read_lazily: Callable[..., dict[str, Any]]) -> None:
    """Write the weights as safetensors, one file at a time; `read_lazily` maps the files that the ranks wrote."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards  # type: ignore[import-not-found,unused-ignore]
    from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]

    adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    weights = read_lazily(checkpoint, trained_only=adapter)
    dtype = getattr(torch, _dtype(checkpoint)) if not adapter else None
    if adapter:
        weights = {_adapter_name(name): weight for name, weight in weights.items()}
    # Tensors without data, of the final shapes and dtypes, decide which file each weight goes to.
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


def _deepspeed_weights(checkpoint: Path, *, trained_only: bool) -> dict[str, Any]:
    """Return lazy tensors by name; `contiguous()` reads one. Of tied weights only the first name is returned."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    os.environ["TQDM_DISABLE"] = "1"
    with contextlib.redirect_stdout(None):
        found = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), exclude_frozen_parameters=trained_only, lazy_mode=True
        )
    return dict(_without_tied(found.items()))


class _Stored(NamedTuple):
    """A tensor of a checkpoint folder; `contiguous()` reads it."""

    folder: DcpFolder
    name: str

    @property
    def shape(self) -> Any:
        return self.folder.tensors[self.name].size

    @property
    def dtype(self) -> Any:
        return self.folder.tensors[self.name].properties.dtype

    def contiguous(self) -> Any:
        return self.folder.tensor(self.name)


def _fsdp_weights(checkpoint: Path, **_: bool) -> dict[str, Any]:
    """Return lazy tensors by name; `contiguous()` reads one.

    The checkpoint of an adapter holds nothing but the adapter. FSDP writes a head that is tied to the embedding a
    second time; it is left out here.
    """
    folder = DcpFolder(checkpoint / MODEL)
    found = {folder.paths[name][-1]: _Stored(folder, name) for name in folder.tensors}
    if json.loads((checkpoint / "config.json").read_text()).get("tie_word_embeddings"):
        found.pop(HEAD, None)
    return found


def _without_tied(weights: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Yield each tensor once, under its first name."""
    seen: set[int] = set()
    for name, weight in weights:
        if id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight


def _adapter_name(name: str) -> str:
    """Return a weight's name as PEFT saves it: without the adapter's name and without `modules_to_save`."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _dtype(checkpoint: Path) -> str:
    """Return the dtype that the model was trained in. The weights in the checkpoint are float32 master weights."""
    config = json.loads((checkpoint / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _add_generation_config(into: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    if (into / "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_model_config(AutoConfig.from_pretrained(into)).save_pretrained(into)
    except (OSError, ValueError) as error:
        raise ModelError(f"Transformers cannot read the model config in {into}: {error}") from error


def _name_base(folder: Path, job: Job) -> None:
    """Make the adapter's config name the base by the name under which others can find it."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = job.recipe.model_name_or_path or config["base_model_name_or_path"]
    config["revision"] = job.recipe.model_args.get("model_revision")
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _merge(task: Publish, work: Path) -> None:
    """Replace the adapter in `work` by the merged model, and keep the other files of the folder."""
    from trainer.worker.export import merge_adapter

    adapter = work.with_name(f"{work.name}-adapter")
    shutil.rmtree(adapter, ignore_errors=True)
    work.rename(adapter)
    try:
        base, recipe, fit = _base(task.job), task.job.recipe, task.job.fit
        merge_adapter(base, adapter, recipe, fit, work, trained_on=_trained_on(task.source))
        for path in adapter.iterdir():
            if not path.name.startswith("adapter_") and path.is_file():
                shutil.copy2(path, work / path.name) if not (work / path.name).exists() else None
    finally:
        shutil.rmtree(adapter, ignore_errors=True)


def _base(job: Job) -> Base:
    from trainer.worker import sources

    return model_source.locate(job, sources.read(job.recipe).train if job.recipe.init else [])


def _trained_on(source: Path) -> str | None:
    path = source / IDENTITY_FILE
    return str(json.loads(path.read_text())["model"]) if path.is_file() else None


def _push(task: Publish, repository: str) -> None:
    """Upload to the Hub at $HF_ENDPOINT, with the token that huggingface_hub finds; neither is logged."""
    from huggingface_hub import HfApi  # type: ignore[import-not-found,unused-ignore]
    from huggingface_hub.errors import HfHubHTTPError  # type: ignore[import-not-found,unused-ignore]

    api = HfApi()
    try:
        api.create_repo(repository, private=task.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=task.into, commit_message=f"Step {task.step} of {task.job.run_id}"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        status = http_status(error)
        hint = "set $HF_TOKEN to a token with write access to it" if status in (401, 403) else None
        reason = f"it answers {status}" if status else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ModelError(f"{repository} cannot be pushed to the Hub: {reason}", hint=hint) from None
    log.info("pushed to %s", getattr(commit, "repo_url", repository))


def main() -> None:
    path = Path(sys.argv[1])
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("trainer").setLevel(logging.INFO)
    task = Publish.model_validate_json(path.read_text())
    try:
        publish(task)
        outcome = Outcome(status="done")
    except UserError as error:
        outcome = Outcome(status="user_error", message=error.message, hint=error.hint)
    write_atomically(task.outcome, outcome.model_dump_json())


if __name__ == "__main__":
    main()

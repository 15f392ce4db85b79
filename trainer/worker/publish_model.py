"""Turns a committed checkpoint into a model for others: `python -m trainer.worker.publish_model PUBLISH_JSON`.

It joins the slices that the ranks wrote, merges an adapter if requested, and uploads the model to the Hub. It runs on
the CPU without an engine, and reads weights through memory maps, so it needs the memory of one file of the model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import ModelError, UserError
from trainer.files import write_atomically
from trainer.job import Job, Outcome, Publish
from trainer.staged import IDENTITY_FILE, TRAINER_STATE_FILE
from trainer.worker import model_source
from trainer.worker.checkpoint.format import (
    INDEX_FILE,
    RANK_FILES,
    SCALARS_FILE,
    is_format_2,
    open_format_2,
)
from trainer.worker.checkpoint.format_1 import FORMAT_1_FILES, open_format_1
from trainer.worker.checkpoint.identity import Identity
from trainer.worker.checkpoint.state import SavedParameter
from trainer.worker.failures import http_status
from trainer.worker.model_source import Base

log = logging.getLogger("trainer.worker.publish_model")
FILE_BYTES = 5 * 10**9
"""The size at which another file of weights begins."""
PT = {"format": "pt"}
"""The metadata by which Transformers recognises torch's tensors."""
LAYER = re.compile(r".*?\.\d+\.")
"""The beginning of the names of a layer's weights."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "lm_head.weight"
CHECKPOINT_ONLY = (
    INDEX_FILE, SCALARS_FILE, RANK_FILES, TRAINER_STATE_FILE, IDENTITY_FILE, "deepspeed.json", "fsdp.json",
    *FORMAT_1_FILES, "*.partial", "README.md",
)  # fmt: skip
"""Files of a checkpoint that do not belong to a model."""
Weights = dict[str, SavedParameter]


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
    """Write the model or adapter of a checkpoint of any format and engine, with its tokenizer and configs.

    Raises:
        UserError: the checkpoint has no weights in a known format.
    """
    shutil.copytree(checkpoint, into, ignore=shutil.ignore_patterns(*CHECKPOINT_ONLY), dirs_exist_ok=True)
    if weights := read_weights(checkpoint):
        _write_weights(weights, into)
    elif not any(into.glob("*.safetensors")):
        raise UserError(f"the checkpoint {checkpoint.name} holds no weights as safetensors")
    if not (into / ADAPTER_CONFIG).is_file():
        _add_generation_config(into)


def read_weights(checkpoint: Path) -> Weights:
    """Return the weights by name, without reading them; empty if the folder holds a model's own files.

    Of tied weights only the first name is returned.
    """
    if is_format_2(checkpoint):
        return dict(open_format_2(checkpoint).parameters)
    path = checkpoint / IDENTITY_FILE
    origin = Identity.model_validate_json(path.read_text()) if path.is_file() else None
    if origin is None or origin.engine in ("single", "ddp"):
        return {}
    weights = dict(open_format_1(checkpoint, origin.engine, origin.world_size).parameters)
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("tie_word_embeddings") and origin.engine == "fsdp2":  # it wrote a tied head a second time
        weights.pop(HEAD, None)
    if (checkpoint / ADAPTER_CONFIG).is_file():
        return weights
    # The files have float32 masters of a model that was trained in another dtype.
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {name: replace(weight, dtype=dtype) for name, weight in weights.items()}


def _write_weights(weights: Weights, into: Path) -> None:
    """Write the weights as safetensors, one file at a time."""
    from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]

    if (into / ADAPTER_CONFIG).is_file():
        save_file({adapter_name(name): each.weights() for name, each in weights.items()}, into / ADAPTER, PT)
        return
    convert = _conversion_of(into)
    parts = list(_divide(weights))
    total_bytes = 0
    files: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        tensors = convert({name: weights[name].weights() for name in names})
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, into / f"model{suffix}.safetensors", PT)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        files |= dict.fromkeys(tensors, f"model{suffix}.safetensors")
    if len(parts) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
        (into / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _divide(weights: Weights) -> Iterator[list[str]]:
    """Yield the names of each file's weights. Those of a layer stay together, because a conversion may need several."""
    layers: dict[str, list[str]] = {}
    for name in weights:
        layer = LAYER.match(name)
        layers.setdefault(layer[0] if layer else name, []).append(name)
    part: list[str] = []
    size = 0
    for names in layers.values():
        more = sum(weights[name].count * weights[name].export_dtype.itemsize for name in names)
        if part and size + more > FILE_BYTES:
            yield part
            part, size = [], 0
        part, size = part + names, size + more
    yield part


def _conversion_of(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function from a model's weights in memory to those in its files.

    Transformers holds the weights of some models in another form than their files have, such as all experts of a layer
    in one tensor. It leaves models alone that bring their own code.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    if "auto_map" in json.loads((folder / "config.json").read_text()):
        return dict
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return partial(revert_weight_conversion, model)


def adapter_name(name: str) -> str:
    """Return a weight's name as PEFT saves it: without the adapter's name and without `modules_to_save`."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


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

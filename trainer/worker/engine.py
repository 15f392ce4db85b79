"""Sets up the engine that the fit chose, DeepSpeed or FSDP: config, trainer settings, compiled host code, sharded state.

The supervisor starts the processes and sets their environment (`trainer.supervisor.workers`). One process and DDP need
nothing here: Accelerate reads the rank variables, and uses nccl on GPUs and gloo on the CPU.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.fit import Fit
from trainer.job import Job
from trainer.memory.precision import half_precision
from trainer.memory.resident import DEFAULT_OPTIMIZER
from trainer.memory.transients import MAX_LIVE, PREFETCH, REDUCE_BUCKET, SUB_GROUP
from trainer.recipe import Recipe
from trainer.worker import fsdp

log = logging.getLogger(__name__)
PERSISTENCE_THRESHOLD = 10**5
"""ZeRO 3 keeps parameters with fewer elements whole; `trainer.memory.resident` counts them like this."""
HOST_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adagrad"}
"""Values of `optim` for which DeepSpeed has vectorised host code.

Accelerate silently replaces every other optimizer by DeepSpeed's Adam too
(https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/deepspeed.py,
`map_pytorch_optim_to_deepspeed`), unless `zero_force_ds_cpu_optimizer` is false. Then torch runs them on the host.
"""
DEFAULT_MAX_GRAD_NORM = 1.0
"""The default of TrainingArguments (https://huggingface.co/docs/transformers)."""
NEVER = 10**9
"""Steps between two status lines of DeepSpeed."""


def config(recipe: Recipe, fit: Fit, *, has_bf16: bool) -> dict[str, Any] | None:
    """Return the config of DeepSpeed or of FSDP; None if every rank holds a whole replica."""
    if fit.engine == "fsdp2":
        return fsdp.config(fit)
    return deepspeed_config(recipe, fit, has_bf16=has_bf16)


def config_name(fit: Fit) -> str:
    """Return `deepspeed` or `fsdp`: the key in events and manifests, and with `.json` the file name."""
    return "fsdp" if fit.engine == "fsdp2" else "deepspeed"


def deepspeed_config(recipe: Recipe, fit: Fit, *, has_bf16: bool) -> dict[str, Any] | None:
    """Return DeepSpeed's whole config (https://www.deepspeed.ai/docs/config-json/); None without ZeRO.

    Sizes are those that `trainer.memory` counts with. There is no key `optimizer`: Transformers makes the optimizer,
    so that norms and biases keep their own group without weight decay.
    """
    if not fit.is_zero:
        return None
    half = half_precision(recipe, has_bf16=has_bf16)
    clip = recipe.trainer_args.get("max_grad_norm", DEFAULT_MAX_GRAD_NORM)
    config: dict[str, Any] = {
        "train_batch_size": fit.processes * fit.micro_batch * fit.accumulation,
        "train_micro_batch_size_per_gpu": fit.micro_batch,
        "gradient_accumulation_steps": fit.accumulation,
        "gradient_clipping": float(clip or 0.0),
        "bf16": {"enabled": half == "bfloat16"},
        "fp16": {"enabled": half == "float16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero3(fit) if fit.engine == "zero3" else _zero2(),
        "steps_per_print": NEVER,
    }
    if fit.nodes > 1:  # nodes share no folder, only the bucket
        config["checkpoint"] = {"use_node_local_storage": True}
    if fit.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = _host(fit)
        config["zero_force_ds_cpu_optimizer"] = steps_on_host(recipe)
    if fit.offload_parameters:
        config["zero_optimization"]["offload_param"] = _host(fit)
    return config


def steps_on_host(recipe: Recipe) -> bool:
    """Return whether DeepSpeed's own code runs an offloaded optimizer; if not, torch runs it on the host."""
    return str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER)) in HOST_OPTIMIZERS


def settings(config: dict[str, Any] | None, fit: Fit) -> dict[str, Any]:
    """Return the arguments for TRL that enable the engine.

    On the CPU (in tests) Accelerate supports neither engine, so `start` makes Accelerate's state beforehand.
    """
    if config is None:
        return {"use_cpu": fit.use_cpu}
    if fit.engine == "fsdp2":
        return {"use_cpu": fit.use_cpu, **copy.deepcopy(config)}  # Transformers writes into it
    if not fit.use_cpu:
        return {"use_cpu": False, "deepspeed": config}
    return {"use_cpu": False, "deepspeed": config, "accelerator_config": {"use_configured_state": True}}


def start(job: Job, config: dict[str, Any] | None) -> None:
    """Write the config to the attempt's folder, and compile what the engine needs; call before TRL's arguments exist.

    Raises:
        UserError: DeepSpeed's host code cannot be compiled on this machine.
    """
    if config is None:
        return
    if os.environ.get("RANK", "0") == "0":
        write_atomically(job.work / f"{config_name(job.fit)}.json", json.dumps(config, indent=2))
    if job.fit.engine == "fsdp2":
        if job.fit.use_cpu:
            fsdp.start()
        return
    if job.fit.use_cpu:
        from accelerate import PartialState

        compile_host_communication()
        PartialState(backend="gloo")
    if job.fit.offload_optimizer and steps_on_host(job.recipe):
        compile_host_adam(job.recipe)


def compile_host_adam(recipe: Recipe) -> None:
    """Compile DeepSpeed's optimizer for the host into $TORCH_EXTENSIONS_DIR; other ranks wait for the first one.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    from deepspeed.ops.op_builder.cpu import CPUAdagradBuilder, CPUAdamBuilder

    builder = CPUAdagradBuilder() if recipe.trainer_args.get("optim") == "adagrad" else CPUAdamBuilder()
    try:
        _compile(builder)
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"DeepSpeed's {builder.NAME}, which steps an offloaded optimizer, cannot be compiled here: "
            f"{str(error).strip().splitlines()[-1]}",
            hint="install g++ and ninja, or train without offload: `offload: none`",
        ) from error


def compile_host_communication() -> None:
    """Compile the operation that DeepSpeed needs for ranks on the CPU."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    _compile(ShareMemCommBuilder())


def whole_weights(trainer: Any, fit: Fit) -> dict[str, Any] | None:
    """Gather the weights of a sharded model on the host of rank 0, one parameter at a time; every rank must call this.

    Returns None if the model holds its own weights, and an empty dict on the other ranks.
    """
    if not fit.shards_parameters:
        return None
    from peft import PeftModel

    adapter = isinstance(trainer.model, PeftModel)
    if fit.engine == "fsdp2":
        return fsdp.gathered(trainer.model, trained_only=adapter)
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gathered: dict[str, Any] | None = trainer.deepspeed._zero3_consolidated_16bit_state_dict(  # noqa: SLF001
        exclude_frozen_parameters=adapter
    )
    unset_hf_deepspeed_config()  # models that are loaded after this are not partitioned
    return gathered or {}


def _zero2() -> dict[str, Any]:
    return {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": False,  # it needs a second bucket, which `trainer.memory` does not count
        "reduce_scatter": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_bucket_size": REDUCE_BUCKET,
    }


def _zero3(fit: Fit) -> dict[str, Any]:
    return {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": not fit.use_cpu,
        "reduce_bucket_size": REDUCE_BUCKET,
        "sub_group_size": SUB_GROUP,
        "stage3_max_live_parameters": MAX_LIVE,
        "stage3_max_reuse_distance": MAX_LIVE,
        "stage3_prefetch_bucket_size": PREFETCH,
        "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        "stage3_gather_16bit_weights_on_model_save": False,  # only the export gathers, see `whole_weights`
    }


def _host(fit: Fit) -> dict[str, Any]:
    """Return DeepSpeed's offload target; pinned memory lets a GPU copy while it computes."""
    return {"device": "cpu", "pin_memory": not fit.use_cpu}


def _compile(builder: Any) -> None:
    """Compile and load one of DeepSpeed's operations, one process of the machine at a time."""
    beside_python = str(Path(sys.executable).parent)  # ninja may be installed only there
    if beside_python not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + beside_python
    with _compile_lock(builder.name):
        builder.load()


@contextmanager
def _compile_lock(name: str) -> Iterator[None]:
    """Hold a lock while an operation is compiled, and remove the lock file of a process of ours that was killed.

    Torch marks a compilation by a file (`torch.utils.file_baton`). A killed process leaves the file behind, and every
    later process would wait for ever. Our lock ends with the process that holds it. If the last holder was killed, its
    mark is still in our file, and the next holder removes torch's file. Without the mark torch's file stays, because
    another program may be compiling.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    with (folder / "aeolus.lock").open("a+") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        ours.seek(0)
        if ours.read():
            (folder / "lock").unlink(missing_ok=True)
        else:
            ours.write("mine until this is cleared")
            ours.flush()
        try:
            yield
        finally:
            ours.truncate(0)

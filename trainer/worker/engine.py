"""What a fit makes of DeepSpeed and FSDP: a config as a value, the settings that bring it in, and sharded state.

Processes and their environment are the supervisor's (`trainer.supervisor.workers`). One process and DDP need nothing
here: Accelerate finds the ranks' variables, and takes nccl on GPUs and gloo on the CPU.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.fit import Fit
from trainer.job import Job
from trainer.memory.precision import half_precision
from trainer.memory.resident import DEFAULT_OPTIMIZER
from trainer.memory.transients import MAX_LIVE, PREFETCH, REDUCE_BUCKET, SUB_GROUP
from trainer.recipe import Recipe
from trainer.worker import fsdp
from trainer.worker.deepspeed_ops import compile_host_adam, compile_host_communication

log = logging.getLogger(__name__)
NEVER_CUT = 10**5
"""Elements below which ZeRO 3 leaves a parameter whole, as `trainer.memory.resident` counts them."""
ON_THE_HOST = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adagrad"}
"""`optim` that DeepSpeed has vectorised code for on the host. Accelerate puts DeepSpeed's Adam in place of every
other one too, in silence (https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/deepspeed.py,
`map_pytorch_optim_to_deepspeed`), unless `zero_force_ds_cpu_optimizer` is false: then torch steps them there."""
DEFAULT_MAX_GRAD_NORM = 1.0
"""Of TrainingArguments (https://huggingface.co/docs/transformers)."""
NEVER = 10**9
"""Steps between two lines that DeepSpeed prints of itself."""


def config(recipe: Recipe, fit: Fit, *, has_bf16: bool) -> dict[str, Any] | None:
    """Of DeepSpeed, or of FSDP; None where whole replicas train."""
    if fit.engine == "fsdp2":
        return fsdp.config(fit)
    return deepspeed_config(recipe, fit, has_bf16=has_bf16)


def config_name(fit: Fit) -> str:
    """`deepspeed` or `fsdp`: in events and manifests; with `.json`, its file."""
    return "fsdp" if fit.engine == "fsdp2" else "deepspeed"


def deepspeed_config(recipe: Recipe, fit: Fit, *, has_bf16: bool) -> dict[str, Any] | None:
    """DeepSpeed's whole config (https://www.deepspeed.ai/docs/config-json/); None without ZeRO.

    Sizes are those that `trainer.memory` counts with. There is no `optimizer`: it is made by Transformers, so that
    norms and biases keep their own group without weight decay.
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
    if fit.nodes > 1:  # no folder is shared: the bucket is
        config["checkpoint"] = {"use_node_local_storage": True}
    if fit.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = _host(fit)
        config["zero_force_ds_cpu_optimizer"] = steps_on_host(recipe)
    if fit.offload_parameters:
        config["zero_optimization"]["offload_param"] = _host(fit)
    return config


def steps_on_host(recipe: Recipe) -> bool:
    """Whether DeepSpeed's own code steps an offloaded optimizer; else torch's, on the host too."""
    return str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER)) in ON_THE_HOST


def _zero2() -> dict[str, Any]:
    return {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": False,  # a second bucket, which the memory has not counted
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
        "stage3_param_persistence_threshold": NEVER_CUT,
        "stage3_gather_16bit_weights_on_model_save": False,  # a checkpoint has every rank's part; the export gathers
    }


def _host(fit: Fit) -> dict[str, Any]:
    """Pinned, so that copies run beside the computation; there is nothing to pin for on the CPU."""
    return {"device": "cpu", "pin_memory": not fit.use_cpu}


def settings(config: dict[str, Any] | None, fit: Fit) -> dict[str, Any]:
    """What of TRL's arguments brings the engine in.

    On the CPU (in tests) Accelerate knows neither, so its state is made before: `start`.
    """
    if config is None:
        return {"use_cpu": fit.use_cpu}
    if fit.engine == "fsdp2":
        return {"use_cpu": fit.use_cpu, **copy.deepcopy(config)}  # Transformers writes into it
    if not fit.use_cpu:
        return {"use_cpu": False, "deepspeed": config}
    return {"use_cpu": False, "deepspeed": config, "accelerator_config": {"use_configured_state": True}}


def start(job: Job, config: dict[str, Any] | None) -> None:
    """Before TRL's arguments are made: write the config where the attempt's other files lie, compile what it needs.

    Raises:
        UserError: DeepSpeed's code for the host cannot be compiled here.
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


def whole_weights(trainer: Any, fit: Fit) -> dict[str, Any] | None:
    """Where parameters are cut: the trained model's weights on the host of rank 0, gathered a parameter at a time; every
    rank has to call it. None where the model has its weights itself.
    """
    if not fit.cuts_parameters:
        return None
    from peft import PeftModel

    adapter = isinstance(trainer.model, PeftModel)
    if fit.engine == "fsdp2":
        return fsdp.gathered(trainer.model, trained_only=adapter)
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gathered: dict[str, Any] | None = trainer.deepspeed._zero3_consolidated_16bit_state_dict(  # noqa: SLF001
        exclude_frozen_parameters=adapter
    )
    unset_hf_deepspeed_config()  # whatever is loaded from here on is loaded whole
    return gathered or {}


def load_only(trainer: Any, folder: Path, fit: Fit, *, steps: int) -> None:
    """Bring the weights of a run's last checkpoint, after so many steps, into the trainer's model; none is taken."""
    if fit.is_sharded or trainer.converted:
        trainer._prepare_for_training(  # noqa: SLF001 (what `train` begins with: its model is whole only in parts)
            steps, trainer.get_train_dataloader(), str(folder)
        )
    else:
        trainer._load_from_checkpoint(str(folder))  # noqa: SLF001


class ShardedCheckpointMixin:
    """For a TRL trainer: a checkpoint of DeepSpeed's or FSDP's is its ranks' parts, and no model beside them."""

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, folder: str | None) -> Any:
        maps = folder and self.is_deepspeed_enabled and not self.converted  # a conversion maps by itself
        with loads() if maps else nullcontext():
            prepared = super()._prepare_for_training(max_steps, loader, folder)  # type: ignore[misc]
        if maps:
            own_memory(self.deepspeed.optimizer.optimizer)
        if self.args.fsdp:
            fsdp.check(self.model)
        return prepared

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Transformers would save all parts here, and again with the optimizer."""
        if not (_internal_call and (self.is_deepspeed_enabled or self.is_fsdp_enabled)):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        elif self.args.should_save:
            for config in [self.model.config, *getattr(self.model, "peft_config", {}).values()]:
                config.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)


@contextmanager
def loads() -> Iterator[None]:
    """`torch.load` of a path maps the file: its pages are the system's, which takes them back."""
    from torch.utils.serialization import config

    before = config.load.mmap
    config.load.mmap = True
    try:
        yield
    finally:
        config.load.mmap = before


def own_memory(optimizer: Any) -> None:
    """Where a state on the host is the file's own pages, which a file on tmpfs would hold for as long as it is used, it
    becomes memory, a tensor at a time; what is loaded into other tensors is of no file.
    """
    import torch

    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and value.device.type == "cpu":
                state[name] = value.clone()

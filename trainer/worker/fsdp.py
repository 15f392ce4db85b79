"""FSDP 2, as Accelerate brings it in: its config, how it comes to run on the CPU, and what is done with its shards."""

from __future__ import annotations

import copy
from typing import Any

from trainer.fit import Fit


def config(fit: Fit) -> dict[str, Any]:
    """Transformers' arguments (https://huggingface.co/docs/transformers/fsdp). Layers are the model's own
    (`_no_split_modules`); dtypes follow from `bf16` and `fp16`.
    """
    accelerator: dict[str, Any] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if fit.use_cpu:
        accelerator["use_configured_state"] = True
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",  # Transformers would gather all of it on rank 0
            "cpu_offload": False,
            "cpu_ram_efficient_loading": False,
            # `gradient_checkpointing` says it, as for every engine: no layer is gathered more often for it.
            "activation_checkpointing": False,
        },
        # Accelerate would keep whole gradients on every rank from one micro batch to the next.
        "accelerator_config": accelerator,
    }


def start() -> None:
    """On the CPU, before TRL's arguments are made. Accelerate gives FSDP to processes that have GPUs, and to others DDP,
    without a word (`AcceleratorState.__init__`): so it is told that these have some.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # noqa: SLF001


def check(model: Any) -> None:
    """Raise unless every weight of a prepared model is cut, layer by layer."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        raise RuntimeError(
            f"FSDP 2 was asked for, and {len(whole)} weights are whole on every rank: {whole[0]}"
        )
    units = sum(isinstance(each, FSDPModule) for each in model.modules())
    layers = model.config.get_text_config().num_hidden_layers
    if units <= layers:
        raise RuntimeError(f"FSDP 2 cut the model in {units} units, and it has {layers} layers")


def gathered(model: Any, *, trained_only: bool) -> dict[str, Any]:
    """Whole weights on the host of rank 0, gathered one by one; every rank has to call it, and the others get none. Of
    weights that are tied the first.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    return {name: weight for name, weight in whole.items() if name not in tied}


def layer_by_layer(model: Any, accelerator: Any) -> Any:
    """A model that is not trained, cut as the policy is: TRL's `prepare_fsdp` makes one unit of all layers."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model.requires_grad_(requires_grad=False)).eval()


def frozen(model: Any, accelerator: Any) -> Any:
    """The policy before its first step, without its adapter, cut for forward passes. It has shards of its own, made
    of the policy's weights a layer at a time; the policy itself is cut when it is trained.
    """
    import torch

    shared = {
        id(weight): torch.nn.Parameter(weight.data, requires_grad=False) for weight in model.parameters()
    }
    other = copy.deepcopy(model, dict(shared))
    if hasattr(other, "peft_config"):
        other.base_model.disable_adapter_layers()
    return layer_by_layer(other, accelerator)

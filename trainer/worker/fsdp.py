"""FSDP 2 through Accelerate: its config, how it runs on the CPU, and operations on sharded weights."""

from __future__ import annotations

import copy
from typing import Any

from trainer.fit import Fit


def config(fit: Fit) -> dict[str, Any]:
    """Return the arguments for Transformers (https://huggingface.co/docs/transformers/fsdp).

    The model itself names its layers (`_no_split_modules`). The dtypes follow from `bf16` and `fp16`.
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
            "state_dict_type": "SHARDED_STATE_DICT",  # otherwise Transformers would gather everything on rank 0
            "cpu_offload": False,
            "cpu_ram_efficient_loading": False,
            # Set by `gradient_checkpointing`, as for every engine. FSDP 2 gathers a layer only once for both.
            "activation_checkpointing": False,
        },
        # Otherwise Accelerate would keep whole gradients on every rank between micro batches.
        "accelerator_config": accelerator,
    }


def start() -> None:
    """Make Accelerate use FSDP on the CPU; call this before TRL's arguments are made.

    Without GPUs, Accelerate silently uses DDP instead of FSDP (`AcceleratorState.__init__`). So its state is set to
    several GPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # noqa: SLF001


def check(model: Any) -> None:
    """Raise `RuntimeError` unless every weight of a prepared model is sharded, layer by layer."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        raise RuntimeError(
            f"FSDP 2 was requested, but {len(whole)} weights are whole on every rank, for example {whole[0]}"
        )
    units = sum(isinstance(each, FSDPModule) for each in model.modules())
    layers = model.config.get_text_config().num_hidden_layers
    if units <= layers:
        raise RuntimeError(
            f"FSDP 2 made {units} units of the model, but must make more than {layers}, one for each layer and one for the rest"
        )


def gathered(model: Any, *, trained_only: bool) -> dict[str, Any]:
    """Gather the weights on the host of rank 0, one by one; every rank must call this, and other ranks get none.

    Of tied weights only the first name is returned.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    return {name: weight for name, weight in whole.items() if name not in tied}


def layer_by_layer(model: Any, accelerator: Any) -> Any:
    """Shard a model that is not trained like the policy. TRL's `prepare_fsdp` makes one unit of all layers."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model.requires_grad_(requires_grad=False)).eval()


def frozen(model: Any, accelerator: Any) -> Any:
    """Return the policy before its first step, without its adapter, sharded for forward passes.

    It gets its own shards, made from the policy's weights one layer at a time. The policy itself is sharded later, when
    the training starts.
    """
    import torch

    shared = {
        id(weight): torch.nn.Parameter(weight.data, requires_grad=False) for weight in model.parameters()
    }
    other = copy.deepcopy(model, dict(shared))
    if hasattr(other, "peft_config"):
        other.base_model.disable_adapter_layers()
    return layer_by_layer(other, accelerator)

"""Tables of old recipe keys: those that were renamed, those that are ignored, and those that no longer exist.

Sources: alignment-handbook's configs from 2023 to 2025, TRL 0.7 to 1.16, Transformers 4.36 to 5.23.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Gone(NamedTuple):
    """A key that no longer exists and has no successor.

    A harmless value is ignored with a note. Any other value is an error, because training would differ without it.
    """

    harmless: tuple[Any, ...]
    reason: str
    hint: str = "remove the key if you want to train without it"


RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "text_column": "dataset_text_field",
    "use_liger": "use_liger_kernel",
}

_REASONS = {
    "the run's folder is always in the bucket": "output_dir logging_dir overwrite_output_dir save_on_each_node",
    "every attempt resumes from the newest committed checkpoint": (
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    "the supervisor handles preemptions": "enable_jit_checkpoint",
    "a checkpoint always contains everything that an exact resume needs": "save_only_model save_safetensors",
    "a run always trains, and `eval_strategy` decides whether it evaluates": "do_train do_eval do_predict",
    "the model is exported to the bucket": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
        "hub_model_revision push_to_hub_model_id push_to_hub_organization push_to_hub_token "
        "push_to_hub_revision overwrite_hub_revision"
    ),
    "the run's log is its events, one for each step": (
        "log_level log_level_replica log_on_each_node logging_first_step logging_strategy logging_nan_inf_filter "
        "disable_tqdm include_tokens_per_second callbacks num_completions_to_print benchmarks wandb_entity "
        "wandb_project wandb_run_group"
    ),
    "recipes do not describe hardware; the fit decides these settings for each shape": (
        "deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap sharded_ddp "
        "parallelism_config accelerator_config local_rank use_cpu no_cuda use_mps_device use_ipex xpu_backend "
        "tpu_num_cores tpu_metrics_debug mp_parameters ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb "
        "ddp_find_unused_parameters ddp_static_graph ddp_timeout dataloader_drop_last dataloader_in_order "
        "dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dispatch_batches split_batches auto_find_batch_size "
        "dataset_num_proc preprocessing_num_workers dataset_batch_size optimize_cuda_cache optimize_device_cache "
        "ignore_bias_buffers"
    ),
    "only the newest checkpoints are kept, so the best one cannot be restored": (
        "metric_for_best_model greater_is_better"
    ),
    "with `false` the loss would depend on the number of GPUs": "average_tokens_across_devices",
    "TRL no longer needs it": (
        "use_logits_to_keep use_num_logits_to_keep use_liger_loss base_model_attribute_name padding_value "
        "num_of_sequences chars_per_token"
    ),
    "Transformers removed it, and it only changed the speed": (
        "half_precision_backend fp16_backend fp16_opt_level jit_mode_eval torchdynamo ray_scope "
        "include_inputs_for_metrics"
    ),
    "an evaluation computes losses and rewards and generates no text": "generate_during_eval",
}
IGNORED = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
"""Keys that have no effect, each with the reason."""

_OTHER_REFERENCE = "TRL removed it: the reference is the model that training starts from"
_OTHER_CODE = "model, tokenizer and code are loaded from one place and one revision"

GONE = {
    "base_model_revision": Gone((None, "main"), _OTHER_CODE, "use `model_revision`"),
    "chat_template_path": Gone(
        (None,), "the template is part of the recipe", "write the template's text as `chat_template`"
    ),
    "dataset_streaming": Gone((None, False), "an exact resume needs the whole data set"),
    "eos_token": Gone(
        (None,), "the data are tokenised before TRL could change the token", "set it in the model's tokenizer"
    ),
    "force_use_ref_model": Gone((None, False), _OTHER_REFERENCE),
    "is_encoder_decoder": Gone((None, False), "only decoder models are trained"),
    "label_pad_token_id": Gone((None, -100), "TRL masks labels with -100 and takes no other"),
    "load_best_model_at_end": Gone(
        (None, False),
        "older checkpoints are deleted from the machine and the bucket",
        "the final model is the last one",
    ),
    "max_completion_length": Gone(
        (None,),
        "TRL does not cut completions separately",
        "use `max_length`, the limit of prompt and completion together",
    ),
    "max_target_length": Gone(
        (None,),
        "TRL does not cut completions separately",
        "use `max_length`, the limit of prompt and completion together",
    ),
    "model_adapter_name": Gone((None,), _OTHER_REFERENCE),
    "model_code_revision": Gone((None, "main"), _OTHER_CODE, "use `model_revision`"),
    "past_index": Gone((None, -1), "Transformers removed it"),
    "ref_adapter_name": Gone((None,), _OTHER_REFERENCE),
    "ref_model_init_kwargs": Gone((None, {}), _OTHER_REFERENCE),
    "reference_free": Gone((None, False), "TRL always compares with the reference"),
    "rpo_alpha": Gone(
        (None,),
        "TRL removed it",
        "use `loss_type: [sigmoid, sft]` with `loss_weights: [1.0, <rpo_alpha>]` instead",
    ),
    "streaming": Gone((None, False), "an exact resume needs the whole data set"),
    "sync_ref_model": Gone(
        (None, False), "the moving reference is in no checkpoint, so a recovery would not be exact"
    ),
    "system_prompt": Gone(
        (None, ""), "no system prompt is added to the data", "put it in the data or the chat template"
    ),
    "tools": Gone((None, []), "TRL reads tools from the data"),
}

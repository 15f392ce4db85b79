"""Resume a checkpoint under another engine or number of processes. Its state is converted while it is restored.

DeepSpeed's universal checkpoints could do a part of this, after a conversion on disk. They are not used, because their
load has two bugs: all sub-groups share one step tensor, which each of them increments, and all groups get the weight
decay of the first one (`stage3.py`, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`, 0.19.8).

    checkpoint_state       the interface: a checkpoint's state, parameter by parameter
    deepspeed_checkpoint   the state in a checkpoint of ZeRO-2 or ZeRO-3
    fsdp_checkpoint        the state in a checkpoint of FSDP2
    replica_checkpoint     the state in a checkpoint of one process or DDP
    optimizer_layout       the tensors that an engine's optimizer steps, and where each parameter is in them
    fill                   copies a checkpoint's state into these tensors
    trainer_mixin          makes a TRL trainer do this in place of its own load
"""

"""A checkpoint of one engine and number of processes goes on under another: state is converted as it is restored.

DeepSpeed's universal checkpoints could do a part of this, after a conversion on disk. Its load of them gives all
sub-groups one step tensor, which each counts up, and all groups the first one's weight decay (`stage3.py`,
`load_hp_checkpoint_state_from_checkpoint_dir_stage3`, 0.19.8); nothing of it is used here.

    saved     what a checkpoint has, seen parameter by parameter: `parts` of DeepSpeed's, `chunks` of FSDP's, or `whole`
    stepped   what an engine's optimizer steps, and which parameters lie where in it
    fill      from the one into the other
    resharded the trainer that does so in place of its own load
"""

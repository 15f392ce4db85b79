"""Checkpoints: one format for every engine, which a run resumes under any engine and any number of processes.

A checkpoint is a folder:

    index.json                   every parameter: its shape, and which slice of it is in which file
    scalars.json                 steps, learning rates, schedule and loss scale
    rank-00000.safetensors       the slices of one rank, and its random numbers
    trainer_state.json           Transformers' counters, such as the step and the epoch
    aeolus.json                  the identity of model, data and packages
    config.json, tokenizer.json  and the other files of a model without its weights

All of it is JSON or safetensors, so reading a checkpoint runs no code of it. A parameter's values are stored once: the
float32 masters, or the weights themselves where no masters exist. The model's weights under DeepSpeed are derived from
the masters. A slice is a range of the parameter's elements in row-major order, because DeepSpeed splits parameters
without regard to rows.

torch.distributed.checkpoint (DCP) writes safetensors too (`HuggingFaceStorageWriter`). It is not used: its slices are
boxes of a tensor's dimensions, it writes new files at every save, it has no place for DeepSpeed's states, and its
resharding of optimizer states goes through a pickled index.

    optimizer_layout   the tensors that an engine's optimizer steps, and where each parameter is in them
    state              the interface to read a checkpoint's state, parameter by parameter
    format             the files above: their names, and `open_checkpoint`
    buffers            safetensors files whose memory is reused from one save to the next
    save               copies the state into such files
    load               copies a checkpoint's state into an engine's optimizer
    random_state       the random numbers of a process, as tensors
    trainer_mixin      makes a TRL trainer save and load like this
    format_1           reads the checkpoints of release 0.1, which each engine's library wrote
    dcp_folder         reads FSDP2's part of them
    pickles            loads the pickles in them without running their code
"""

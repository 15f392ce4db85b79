"""The training process of one rank: `python -m trainer.worker JOB_JSON`.

It exits with 0 when the training is done or preempted, else with 1. The details are in `outcome.json`; a bug leaves no
such file.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from trainer.job import Job, Outcome
from trainer.parent_death import die_with_parent
from trainer.worker.arguments import compute_deterministically
from trainer.worker.failures import outcome_of
from trainer.worker.imports import QUIET, train_function, uncollected
from trainer.worker.supervisor_channel import Channel, ChannelHandler

RANK_VARIABLE, LOCAL_RANK_VARIABLE = "RANK", "LOCAL_RANK"  # set by the supervisor if there are several ranks

NOISE = (
    "torch.utils.checkpoint",
    "Token indices sequence length is longer",  # data.py cuts sequences after this warning
    "The tokenizer has new PAD/BOS/EOS tokens",  # intended: Transformers copies ours into the model's config
    "Loss will be computed",
    "PyTorch is not compiled with",
    "The following arguments do not match the ones in the `trainer_state.json`",  # intended: the recipe's values are used, see `Progress.on_train_begin`
    "`use_cache=True` is incompatible",
    "`tie_word_embeddings`",
    "Failed to load CPU gemm_4bit_forward",  # an optional kernel
    "torch_dtype` is deprecated",
    "No device id is provided via `init_process_group`",
    "Could not find a config file in",  # PEFT looks up the base on the Hub, but it may be a GGUF file
    "Gradient accumulation steps mismatch",  # Accelerate's plugin gets 1, because the Trainer accumulates itself
    "prefer `fsdp_config['activation_checkpointing']`",  # intended, see `fsdp.config`
    "lr_scheduler.step()` before `optimizer.step()",
)
"""Parts of messages of the training packages that a user cannot act on; such messages are dropped."""


class _NoiseFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(noise in message for noise in NOISE)


def configure_logging(channel: Channel) -> None:
    """Send our own log records to the supervisor, and other packages' warnings to stderr; disable progress bars."""
    os.environ.update(QUIET)
    stderr = logging.StreamHandler()
    stderr.addFilter(_NoiseFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[stderr], format="%(name)s: %(message)s")
    logging.captureWarnings(capture=True)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    # DeepSpeed sets the level of its logger itself, so a filter is needed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    ours = logging.getLogger("trainer")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [ChannelHandler(channel)]

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_warning()


def run(job: Job, channel: Channel) -> Outcome:
    """Train, and return the outcome.

    Errors that `failures.outcome_of` recognises become an outcome. All other errors are bugs and are raised.
    """
    import torch

    # A sum that is split over another number of threads differs in its last bits.
    torch.set_num_threads(job.fit.threads)
    compute_deterministically(job.recipe)
    try:
        return train_function(job.recipe.method)(job, channel)
    except Exception as error:  # a full disk or a broken GPU surfaces as an error of almost any type
        if outcome := outcome_of(error, job):
            return outcome
        raise


def main() -> None:
    """Run one rank: read the job, train, write the outcome, and exit."""
    die_with_parent(os.getppid())
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    rank, local_rank = (int(os.environ.get(name, "0")) for name in (RANK_VARIABLE, LOCAL_RANK_VARIABLE))
    channel = Channel(job, rank=rank, local_rank=local_rank)
    channel.listen()
    try:
        with uncollected():
            configure_logging(channel)
            train_function(job.recipe.method)
        outcome = run(job, channel)
    except BaseException:
        if job.fit.processes == 1:
            raise
        # Exit at once, whatever the error is: the other ranks must not wait for this one, and a cleanup could wait
        # for them.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    channel.conclude(outcome)
    leave(job, 0 if outcome.status in ("done", "preempted") else 1)


def leave(job: Job, code: int) -> NoReturn:
    """End this process. A successful rank leaves the process group first; a failed rank exits without waiting."""
    # The outcome is written. A signal during Python's shutdown must not end the process with another exit code.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if job.fit.processes > 1 and code == 0:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    elif job.fit.processes > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()

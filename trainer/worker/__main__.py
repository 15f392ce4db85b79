"""The process that trains: `python -m trainer.worker JOB_JSON`.

Exits 0 when it is done or preempted, else 1; the truth is in `outcome.json`, and a bug leaves none.
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

from trainer.disk_full import no_room
from trainer.errors import Unavailable, UserError
from trainer.job import Job, Outcome
from trainer.parent_death import die_with_parent
from trainer.worker import determinism, failures
from trainer.worker.imports import QUIET, train_function, uncollected
from trainer.worker.supervisor_channel import Channel, ChannelHandler

RANK_VARIABLE, LOCAL_RANK_VARIABLE = "RANK", "LOCAL_RANK"  # set by the supervisor where there are several

NOISE = (
    "torch.utils.checkpoint",
    "Token indices sequence length is longer",  # we cut sequences ourselves, after this is said
    "The tokenizer has new PAD/BOS/EOS tokens",  # Transformers writes ours into the model's config, as wanted
    "Loss will be computed",
    "PyTorch is not compiled with",
    "The following arguments do not match the ones in the `trainer_state.json`",  # the recipe's hold: on_train_begin
    "`use_cache=True` is incompatible",
    "`tie_word_embeddings`",
    "Failed to load CPU gemm_4bit_forward",  # an optional kernel
    "torch_dtype` is deprecated",
    "No device id is provided via `init_process_group`",
    "Could not find a config file in",  # PEFT asks the Hub about the base, which may be a GGUF file
    "Gradient accumulation steps mismatch",  # Accelerate's plugin is told 1, as the Trainer accumulates itself
    "prefer `fsdp_config['activation_checkpointing']`",  # FSDP 2 gathers a layer once for both, see `fsdp.config`
    "lr_scheduler.step()` before `optimizer.step()",
)
"""Beginnings or parts of messages of the stack's packages that a user can do nothing about."""


class _NotNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(noise in message for noise in NOISE)


def tame(channel: Channel) -> None:
    """Our own words go to the supervisor; the stack's warnings, less the known noise, to stderr; no bars."""
    os.environ.update(QUIET)
    stderr = logging.StreamHandler()
    stderr.addFilter(_NotNoise())
    logging.basicConfig(level=logging.WARNING, handlers=[stderr], format="%(name)s: %(message)s")
    logging.captureWarnings(capture=True)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: record.levelno >= logging.ERROR
    )  # it sets its level
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
    """Train as the job says; what a user can mend, or a full disk, becomes an outcome;
    anything else is a bug and is raised.
    """
    import torch

    torch.set_num_threads(job.fit.threads)  # sums split over other numbers of threads differ in the last bits
    determinism.compute_alike(job.recipe)
    try:
        return train_function(job.recipe.method)(job, channel)
    except Unavailable as error:
        return Outcome(status="unavailable", message=error.message, hint=error.hint)
    except UserError as error:
        return Outcome(status="user_error", message=error.message, hint=error.hint)
    except Exception as error:  # a full disk and a broken GPU show as many kinds; all else is raised
        if full := no_room(job, error):
            return full
        if gone := failures.broken(error):
            return Outcome(status="unavailable", message=f"a GPU failed: {gone}", hint=failures.HINT)
        if refused := determinism.refused(error):
            return Outcome(status="user_error", message=refused.message, hint=refused.hint)
        raise


def main() -> None:
    die_with_parent(os.getppid())
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    rank, local_rank = (int(os.environ.get(name, "0")) for name in (RANK_VARIABLE, LOCAL_RANK_VARIABLE))
    channel = Channel(job, rank=rank, local_rank=local_rank)
    channel.listen()
    try:
        with uncollected():
            tame(channel)
            train_function(job.recipe.method)
        outcome = run(job, channel)
    except BaseException:  # whatever it is, the other ranks must not wait for this one
        if job.fit.processes == 1:
            raise
        traceback.print_exc()  # a rank that failed ends now: cleaning up could wait for the others
        sys.stderr.flush()
        os._exit(1)
    channel.conclude(outcome)
    leave(job, 0 if outcome.status in ("done", "preempted") else 1)


def leave(job: Job, code: int) -> NoReturn:
    """End this process; a rank that ends well takes leave of the others, one that does not waits for nobody."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # all is said; Python's last steps know no handlers
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

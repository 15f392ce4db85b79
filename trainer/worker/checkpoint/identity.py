"""The identity of a checkpoint: it is written at every save, and checked before a run resumes from the checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trainer.errors import DataError, ModelError, UserError
from trainer.files import write_atomically
from trainer.job import Job
from trainer.staged import IDENTITY_FILE, TRAINER_STATE_FILE
from trainer.worker.checkpoint.format import is_format_2, open_format_2
from trainer.worker.checkpoint.format_1 import find_random, required_files
from trainer.worker.data import TokenizedDataset

log = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "bitsandbytes")
LATER = ("device", "packages")
"""Fields of an identity that older checkpoints lack."""


class Identity(BaseModel):
    """Everything besides the recipe that a training depends on; stored in every checkpoint and its manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    """Fingerprint of the training tokens."""
    tokens: int
    model: str
    """Digest of the weights at the start of the run."""
    reference: str = ""
    """Digest of the log-probabilities of DPO's reference, if they are cached."""
    engine: str = "single"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    world_size: int
    micro_batch: int
    accumulation: int
    threads: int
    device: str = ""
    """The device of rank 0, because another device rounds differently. Empty if it was not recorded."""
    packages: str = ""
    """Names and versions of the packages that affect the results. Empty if they were not recorded."""
    evaluation_due: bool = False
    """A preemption interrupted the evaluation of this step, so a resume begins with it."""

    def words(self) -> str:
        """Describe the engine: `zero3 on 2 processes, optimizer and parameters offloaded`."""
        parts = {"optimizer": self.offload_optimizer, "parameters": self.offload_parameters}
        offloaded = " and ".join(name for name, is_off in parts.items() if is_off)
        where = f"{self.engine} on {self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{where}, {offloaded} offloaded" if offloaded else where


def identity(job: Job, tokens: TokenizedDataset, model: str) -> Identity:
    return Identity(
        data=tokens.fingerprint,
        tokens=tokens.tokens,
        model=model,
        engine=job.fit.engine,
        offload_optimizer=job.fit.offload_optimizer,
        offload_parameters=job.fit.offload_parameters,
        world_size=job.fit.processes,
        micro_batch=job.fit.micro_batch,
        accumulation=job.fit.accumulation,
        threads=job.fit.threads,
        device=device(job),
        packages=packages(),
    )


def device(job: Job) -> str:
    """Return the name of the GPU, or the instruction set by which torch chooses CPU kernels."""
    import torch

    if not job.fit.use_cpu and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"a CPU with {torch.backends.cpu.get_cpu_capability()}"


def packages() -> str:
    """Return the installed versions: `torch 2.13.0+cpu, transformers 5.23.0 ...`."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def write(folder: Path, mine: Identity) -> None:
    write_atomically(folder / IDENTITY_FILE, mine.model_dump_json(indent=2))


def check(folder: Path, mine: Identity) -> Identity:
    """Check that a run can resume from a checkpoint, and return the checkpoint's identity.

    Transformers would silently resume with a missing or foreign state. Differences that only change the last bits are
    logged.

    Raises:
        UserError: a file is missing or damaged.
        DataError: the training data changed since the start of the run.
        ModelError: the base model changed since the start of the run.
    """
    _need(folder, IDENTITY_FILE, TRAINER_STATE_FILE)
    theirs = Identity.model_validate_json((folder / IDENTITY_FILE).read_text())
    if is_format_2(folder):
        random_of = open_format_2(folder).random
    else:
        _need(folder, *required_files(folder, theirs.engine, theirs.world_size))
        random_of = find_random(folder, theirs.world_size)
    for rank in range(theirs.world_size):
        random_of(rank)  # a damaged file of any rank is refused by all ranks
    if theirs.data != mine.data:
        raise DataError(
            f"the training data changed: {theirs.tokens} tokens ({theirs.data}) when the run began, "
            f"{mine.tokens} ({mine.data}) now",
            hint="restore the old data (for a data set of the Hub set its `revision`), or start another run",
        )
    if theirs.model != mine.model:
        raise ModelError(
            f"the base model changed: {theirs.model} when the run began, {mine.model} now",
            hint="restore the old model (for a model of the Hub set `model_revision`), or start another run",
        )
    _warn_if_inexact(theirs, mine)
    return theirs


def _need(folder: Path, *names: str) -> None:
    for name in names:
        if not any(path.is_file() for path in folder.glob(name)):
            raise UserError(
                f"the checkpoint {folder.name} has no {name}",
                hint="remove its commit from the bucket: the run then resumes from the previous checkpoint",
            )


def _warn_if_inexact(theirs: Identity, mine: Identity) -> None:
    changing = (
        "engine",
        "offload_optimizer",
        "offload_parameters",
        "world_size",
        "micro_batch",
        "accumulation",
    )
    for name in (*changing, "threads", "reference", *LATER):
        before, now = getattr(theirs, name), getattr(mine, name)
        if before != now and not (name in LATER and not before):
            log.warning(
                "%s changed from %s to %s: the run resumes, but its results may differ slightly because of rounding",
                name,
                before,
                now,
            )


def at_last_step(folder: Path) -> bool:
    """Return whether the checkpoint was saved at the last step, so that only the export remains."""
    state = _state(folder)
    return bool(state["global_step"] >= state["max_steps"] > 0)


def step(folder: Path) -> int:
    return int(_state(folder)["global_step"])


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / TRAINER_STATE_FILE).read_text())
    return state

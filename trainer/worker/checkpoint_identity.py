"""What a checkpoint must have, and be of, before a run goes on from it."""

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
from trainer.staged import IDENTITY_FILE
from trainer.worker.data import TokenizedDataset
from trainer.worker.reshard.dcp_folder import INDEX, MODEL, OPTIMIZER, Folder

log = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "bitsandbytes")
LATER = ("device", "packages")
"""Of an identity, what older checkpoints do not say."""


class Identity(BaseModel):
    """What a trajectory depends on besides the recipe; kept in every checkpoint and its manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    """Fingerprint of the training tokens."""
    tokens: int
    model: str
    """Digest of the weights that the run began with."""
    reference: str = ""
    """Digest of the log-probabilities of DPO's reference, where they are kept."""
    engine: str = "single"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    world_size: int
    micro_batch: int
    accumulation: int
    threads: int
    device: str = ""
    """What rank 0 computes on: another one rounds otherwise. Empty if nobody wrote it down."""
    packages: str = ""
    """Those whose code decides the bits, with their versions; likewise."""
    evaluation_due: bool = False
    """A notice cut the evaluation of this step short: whoever goes on begins with it."""

    def words(self) -> str:
        """`zero3 on 2 processes, optimizer and parameters offloaded`."""
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
    """The GPU's name; of a CPU the instructions that its kernels are chosen by."""
    import torch

    if not job.fit.use_cpu and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"a CPU with {torch.backends.cpu.get_cpu_capability()}"


def packages() -> str:
    """`torch 2.13.0+cpu, transformers 5.23.0 ...`: of those that are installed."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def write(folder: Path, mine: Identity) -> None:
    write_atomically(folder / IDENTITY_FILE, mine.model_dump_json(indent=2))


def check(folder: Path, mine: Identity) -> Identity:
    """Refuse a checkpoint that Transformers would resume from in silence, with another run's state or with none; what
    wrote it.

    Raises:
        UserError: a file is missing.
        DataError: the training data are not those that the run began with.
        ModelError: the base model is not the one that the run began with.
    """
    _need(folder, IDENTITY_FILE)
    theirs = Identity.model_validate_json((folder / IDENTITY_FILE).read_text())
    _need(folder, *_files(theirs))
    if theirs.engine == "fsdp2":
        _need(
            folder,
            *(
                f"{part}/{file}"
                for part in (MODEL, OPTIMIZER)
                for file in sorted(Folder(folder / part).files)
            ),
        )
    if theirs.data != mine.data:
        raise DataError(
            f"the training data changed: {theirs.tokens} tokens ({theirs.data}) when the run began, "
            f"{mine.tokens} ({mine.data}) now",
            hint="bring the old data back (name a `revision` for a data set of the Hub), or start another run",
        )
    if theirs.model != mine.model:
        raise ModelError(
            f"the base model changed: {theirs.model} when the run began, {mine.model} now",
            hint="bring the old model back (name a `model_revision` for a model of the Hub), or start another run",
        )
    _say_inexact(theirs, mine)
    return theirs


def _need(folder: Path, *names: str) -> None:
    for name in names:
        if not any(path.is_file() for path in folder.glob(name)):
            raise UserError(
                f"the checkpoint {folder.name} has no {name}",
                hint="remove its commit from the bucket: the run goes on from the one before",
            )


def _files(theirs: Identity) -> list[str]:
    """What an engine leaves, as patterns; DeepSpeed's and FSDP's every rank its part."""
    ranks = range(theirs.world_size)
    rng = ["rng_state.pth"] if theirs.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    common = ["scheduler.pt", "trainer_state.json", *rng]
    if theirs.engine == "fsdp2":
        return [*(f"{each}/{INDEX}" for each in (MODEL, OPTIMIZER)), *common]
    if theirs.engine not in ("zero2", "zero3"):
        return ["optimizer.pt", "*model*.safetensors", *common]
    parts = [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]
    if theirs.engine == "zero3":
        parts += [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in ranks]
    else:
        parts.append("global_step*/mp_rank_00_model_states.pt")
    return ["latest", *parts, *common]


def _say_inexact(theirs: Identity, mine: Identity) -> None:
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
            log.warning("%s was %s and is %s: the run goes on, but not bit for bit", name, before, now)


def at_last_step(folder: Path) -> bool:
    """Whether the checkpoint's run only lacked its export."""
    state = _state(folder)
    return bool(state["global_step"] >= state["max_steps"] > 0)


def step(folder: Path) -> int:
    return int(_state(folder)["global_step"])


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return state

"""The log-probabilities of DPO's reference model: computed once by the policy before its first step, then cached.

At the start of every attempt the policy equals the reference, because a checkpoint is loaded into it later. So no
second model is loaded. Computed values are staged for the bucket, at intervals and at the end, and every later attempt
gets them. Training therefore sees the same values, whatever shape computes its steps.

As files they are a folder with one array for each data set, and a description of what the values depend on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError  # type: ignore[import-not-found,unused-ignore]
from safetensors.numpy import load_file, save_file  # type: ignore[import-not-found,unused-ignore]

from trainer.job import Job
from trainer.memory.precision import half_precision
from trainer.staged import Staged, mark_staged
from trainer.worker import fsdp
from trainer.worker.arguments import device_has_bf16
from trainer.worker.data import TokenizedDataset
from trainer.worker.model_source import dtype_name
from trainer.worker.sampling import Numbers, dealt, lengths_of, shuffled
from trainer.worker.supervisor_channel import Channel

log = logging.getLogger(__name__)
ABOUT, VALUES = "reference.json", "logps.safetensors"
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's
TOKENS_PER_TRAINED = 2
"""Tokens in a batch of the reference for each token in a training micro batch.

Without gradients and optimizer steps, twice as many surely fit into memory.
"""
BATCHES_TOGETHER = 8
"""Batches of a rank between two exchanges of the ranks' results."""
STAGE_EVERY_S = 60.0
"""The most computing time that a lost machine costs, besides the upload."""
PROGRESS_EVERY_S = 20.0
Pairs = np.ndarray[Any, np.dtype[np.float32]]
"""Shape (rows, 2): the sums over the tokens of the chosen and the rejected answer; NaN where not computed."""


class LogpsBatch(NamedTuple):
    """One batch over all ranks: a list of row numbers for each rank, which may be empty."""

    rows: tuple[Numbers, ...]


class About(BaseModel):
    """Everything that the values depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    """Digest of the weights."""
    data: str
    """Fingerprint of the training tokens."""
    max_length: int | None
    truncation_mode: str
    precision: str
    """Dtype of the matrix products."""
    ld_alpha: float | None

    @property
    def fingerprint(self) -> str:
        """The xxh3_128 digest of all fields, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.model_dump(), sort_keys=True).encode())


class CachedLogps:
    """Log-probabilities by the fingerprint of their data set."""

    def __init__(self, about: About, values: dict[str, Pairs], *, source: str = "") -> None:
        self.about = about
        self.values = values
        self.source = source
        """The run that computed the values or copied them to its folder; empty if there is none."""

    def pairs(self, data: str, rows: int) -> Pairs:
        """Return the array of a data set; the caller fills the rows that are NaN."""
        if data not in self.values or self.values[data].shape != (rows, 2):
            self.values[data] = np.full((rows, 2), np.nan, dtype=np.float32)
        return self.values[data]

    @property
    def known(self) -> int:
        """The number of computed rows."""
        return sum(int((~np.isnan(each).any(axis=1)).sum()) for each in self.values.values())

    @property
    def digest(self) -> str:
        """The xxh3_128 digest of all values."""
        total = xxhash.xxh3_128()
        for data, values in sorted(self.values.items()):
            total.update(data.encode())
            total.update(np.ascontiguousarray(values).tobytes())
        return total.hexdigest()


def stage(staging: Path, cached: CachedLogps) -> None:
    """Write all known values and mark them staged; the uploader drops an older folder that still waits."""
    folder = f"reference-{cached.known:09d}"
    into = staging / folder
    into.mkdir(exist_ok=True)
    save_file(cached.values, into / VALUES)
    (into / ABOUT).write_text(cached.about.model_dump_json(indent=2))
    details = {"fingerprint": cached.about.fingerprint, "pairs": cached.known}
    mark_staged(staging, Staged(folder=folder, step=0, kind="reference", details=details))


def read(folders: Path | None, about: About) -> CachedLogps:
    """Return the values of the first folder, by name, that matches `about`; log why other folders are skipped."""
    for folder in sorted(folders.iterdir()) if folders and folders.is_dir() else []:
        try:
            theirs = About.model_validate_json((folder / ABOUT).read_text())
            values = load_file(folder / VALUES)
        except (OSError, ValidationError, SafetensorError) as error:
            log.warning("cached log-probabilities of the reference cannot be read: %s", error)
            continue
        if theirs != about:
            log.info("cached log-probabilities belong to another reference: %s", _difference(theirs, about))
        elif all(_is_pairs(each) for each in values.values()):
            source = folder.name.partition("-")[2]
            return CachedLogps(about, {data: np.array(each) for data, each in values.items()}, source=source)
        else:
            log.warning("cached log-probabilities of the reference are not pairs of float32")
    return CachedLogps(about, {})


def about(job: Job, tokens: TokenizedDataset, model: str) -> About:
    """Describe what decides the values of a job. TRL may cut the token ids once more, by `max_length`.

    The attention implementation and the engine are left out. They change only the last bits, and a run that moves to
    another shape keeps its values.
    """
    settings = job.recipe.trainer_args
    half = half_precision(job.recipe, has_bf16=device_has_bf16(job.fit))
    return About(
        model=model,
        data=tokens.fingerprint,
        max_length=settings.get("max_length", job.recipe.training_method.max_length),
        truncation_mode=str(settings.get("truncation_mode", "keep_start")),
        precision=half or dtype_name(job.recipe),
        ld_alpha=settings.get("ld_alpha"),
    )


class Reference:
    """Provides the columns `ref_chosen_logps` and `ref_rejected_logps` that TRL's loss needs."""

    def __init__(
        self,
        job: Job,
        channel: Channel,
        about: About,
        train: TokenizedDataset,
        test: TokenizedDataset | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._channel = channel
        self._about = about
        self._data = {"train": train.fingerprint, "eval": test.fingerprint if test else ""}
        self._cached = CachedLogps(about, {})
        self._clock = clock
        self._staged_at = clock()
        self._computed = 0
        self._read = False

    def add_to(self, trainer: Any, dataset: Any, name: str) -> Any:
        """Return the data set with TRL's two columns; `name` is `train` or `eval`.

        Rows that the run never reaches are not computed. They stay NaN, so that a use of them would be noticed.
        """
        import datasets

        if not self._read:
            self._cached = _shared(read(self._job.reference if _rank() == 0 else None, self._about))
            self._read = True
        data = self._data[name]
        values = self._cached.pairs(data, len(dataset))
        needed = _needed(trainer.args, self._job, data, len(dataset)) if name == "train" else None
        missing = np.flatnonzero(np.isnan(values).any(axis=1))
        missing = missing if needed is None else np.intersect1d(missing, needed)
        if len(missing):
            self._compute(trainer, dataset, missing, values)
        self._report(name, len(dataset), len(missing))
        columns = datasets.Dataset.from_dict({column: values[:, at] for at, column in enumerate(COLUMNS)})
        return datasets.concatenate_datasets([dataset, columns], axis=1)

    @property
    def digest(self) -> str:
        """The digest of all values that training sees."""
        return self._cached.digest

    def keep(self) -> None:
        """Stage all known values, unless this run has them in the bucket.

        Values that another run computed are copied too: later attempts must find the same bits, even if that run is
        deleted.
        """
        if self._computed or self._cached.source != self._job.run_id:
            self._stage()

    def _compute(self, trainer: Any, dataset: Any, missing: Numbers, values: Pairs) -> None:
        """Fill the missing rows of `values` on all ranks; log progress and stage results at intervals."""
        began, done = self._clock(), 0
        logged = began
        with _frozen(trainer) as model:
            for batches in _groups(list(_batches(trainer, dataset, missing)), BATCHES_TOGETHER):
                mine = [_forward(trainer, model, dataset, batch) for batch in batches]
                done += _exchange(batches, mine, values, trainer.args)
                now = self._clock()
                if done < len(missing) and now - logged >= PROGRESS_EVERY_S:
                    logged = now
                    _log_progress(done, len(missing), now - began)
                if done < len(missing) and now - self._staged_at >= STAGE_EVERY_S:
                    self._stage()
        self._computed += done
        seconds = self._clock() - began
        log.info("the reference's log-probabilities: %d pairs computed in %.1f s", done, seconds)

    def _stage(self) -> None:
        if _rank() == 0:
            stage(self._job.staging, self._cached)
        self._staged_at = self._clock()

    def _report(self, name: str, pairs: int, computed: int) -> None:
        self._channel.say("reference", split=name, pairs=pairs, computed=computed)
        if not computed:
            log.info("the reference's log-probabilities of %d %s pairs come from the cache", pairs, name)


def _is_pairs(values: Any) -> bool:
    return bool(values.dtype == np.float32 and values.ndim == 2 and values.shape[1] == 2)


def _difference(theirs: About, mine: About) -> str:
    old, new = theirs.model_dump(), mine.model_dump()
    return "; ".join(f"{key} {old[key]}, not {new[key]}" for key in old if old[key] != new[key])


def _needed(args: Any, job: Job, data: str, rows: int) -> Numbers | None:
    """Return the rows that a run of `max_steps` steps uses; None for all."""
    if args.max_steps <= 0:
        return None
    used: list[Numbers] = []
    left, epoch = args.max_steps, 0
    seed = args.seed if args.data_seed is None else args.data_seed
    while left > 0 and sum(map(len, used)) < rows * 4:  # after four epochs nearly all rows were used
        order = (
            np.arange(rows)
            if args.train_sampling_strategy == "sequential"
            else shuffled(rows, seed=seed, epoch=epoch, data=data)
        )
        steps = dealt(order, job.recipe.global_batch_size, None)[:left]
        used.append(np.unique(steps))
        left, epoch = left - len(steps), epoch + 1
    return None if left > 0 else np.unique(np.concatenate(used))


def _batches(trainer: Any, dataset: Any, rows: Numbers) -> Iterator[LogpsBatch]:
    """Yield batches of rows of similar length, the longest first.

    This keeps padding small, and a batch that does not fit into memory fails at once.
    """
    args = trainer.args
    longest = args.max_length or np.inf
    lengths = np.minimum(lengths_of(dataset)[rows], longest).astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    tokens = TOKENS_PER_TRAINED * args.per_device_train_batch_size * min(longest, int(lengths.max()))
    at = 0
    while at < len(order):
        fits = int(args.precompute_ref_batch_size or max(1, tokens // max(1, lengths[order[at]])))
        together = rows[order[at : at + fits * args.world_size]]
        yield LogpsBatch(tuple(together[rank :: args.world_size] for rank in range(args.world_size)))
        at += len(together)


def _groups(batches: list[LogpsBatch], size: int) -> Iterator[list[LogpsBatch]]:
    for start in range(0, len(batches), size):
        yield batches[start : start + size]


def _forward(trainer: Any, model: Any, dataset: Any, batch: LogpsBatch) -> torch.Tensor:
    """Compute this rank's pairs of a batch, shape (pairs, 2).

    A rank without rows computes a row of rank 0 and drops the result, because ZeRO 3 needs all ranks in every forward.
    """
    mine = batch.rows[trainer.args.process_index]
    rows = [dataset[int(row)] for row in (mine if len(mine) else batch.rows[0][:1])]
    inputs = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
    values = torch.stack([chosen, rejected], dim=1).float()
    return values if len(mine) else values[:0]


def _exchange(batches: list[LogpsBatch], mine: list[torch.Tensor], values: Pairs, args: Any) -> int:
    """Write the results of all ranks into every rank's `values`; return the number of rows."""
    rows = [np.concatenate([batch.rows[rank] for batch in batches]) for rank in range(args.world_size)]
    total = torch.zeros(sum(map(len, rows)), 2, dtype=torch.float32, device=args.device)
    first = sum(len(each) for each in rows[: args.process_index])
    total[first : first + len(rows[args.process_index])] = torch.cat(mine)
    if args.world_size > 1:
        dist.all_reduce(total)  # for each row one rank has the value, and the others have zero
    values[np.concatenate(rows)] = total.cpu().numpy()
    return len(total)


@contextmanager
def _frozen(trainer: Any) -> Iterator[Any]:
    """Yield the policy before its first step, ready for forward passes; leave it unchanged and draw no random numbers.

    Under DeepSpeed, an engine without an optimizer gathers the parameters, as TRL does it for a reference model.
    Under FSDP, a second set of shards is made.
    """
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    training = trainer.model.training
    with torch.random.fork_rng(devices):
        engine = None
        if trainer.is_deepspeed_enabled:
            from trl.models.utils import prepare_deepspeed

            engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        ready = engine or trainer.model
        if trainer.is_fsdp_enabled:
            ready = fsdp.frozen(trainer.model, trainer.accelerator)
        trainer.model.eval()
        try:
            yield ready
        finally:
            if engine is not None:
                engine.destroy()  # otherwise its hooks would gather parameters for the training engine too
            trainer.model.train(training)


def _log_progress(done: int, of: int, seconds: float) -> None:
    rate = done / seconds
    log.info(
        "the reference's log-probabilities: %d of %d pairs, %.1f a second, %.1f min left",
        done, of, rate, (of - done) / rate / 60,
    )  # fmt: skip


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _shared(cached: CachedLogps) -> CachedLogps:
    """Send rank 0's values to every rank. Only rank 0 stages, so only rank 0 needs their source."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return cached
    values = [cached.values]
    dist.broadcast_object_list(values, src=0)
    return CachedLogps(cached.about, values[0], source=cached.source)

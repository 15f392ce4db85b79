"""The log-probabilities of DPO's reference: computed once, by the policy before its first step, and kept.

At the start of every attempt the policy is the reference (a checkpoint is loaded into it later), so no second model is
ever loaded. What is computed is staged for the bucket, now and then on the way and at the end, and handed to each later
attempt; the values that training sees are then the same whatever shape computes its steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from trainer.job import Job
from trainer.memory.precision import half_precision
from trainer.worker import fsdp
from trainer.worker.arguments import has_bf16
from trainer.worker.data import TokenizedDataset
from trainer.worker.model_source import dtype_name
from trainer.worker.reference_files import About, CachedLogps, Pairs, read, stage
from trainer.worker.sampling import Numbers, dealt, lengths_of, shuffled
from trainer.worker.supervisor_channel import Channel

log = logging.getLogger(__name__)
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's
TOKENS_PER_TRAINED = 2
"""Tokens of a batch for each that training has in a micro batch: without gradients and optimizer, as many surely fit."""
BATCHES_TOGETHER = 8
"""Batches of a rank between two exchanges of what the ranks have computed."""
STAGE_EVERY_S = 60.0
"""What a lost machine costs at most, besides the upload."""
TELL_EVERY_S = 20.0


class LogpsBatch(NamedTuple):
    """What the ranks compute at a time: row numbers, a list for each rank; some may have none."""

    rows: tuple[Numbers, ...]


def about(job: Job, tokens: TokenizedDataset, model: str) -> About:
    """What decides the values. Token ids are the tokenizer's work and ours; TRL may cut them again.

    Attention's implementation and the engine are left out: they change the last bits, and a run that moves to another
    shape is to keep its values.
    """
    settings = job.recipe.trainer_args
    half = half_precision(job.recipe, has_bf16=has_bf16(job.fit))
    return About(
        model=model,
        data=tokens.fingerprint,
        max_length=settings.get("max_length", job.recipe.training_method.max_length),
        truncation_mode=str(settings.get("truncation_mode", "keep_start")),
        precision=half or dtype_name(job.recipe),
        ld_alpha=settings.get("ld_alpha"),
    )


class Reference:
    """What TRL asks for the columns of `ref_chosen_logps` and `ref_rejected_logps`."""

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
        self._kept = CachedLogps(about, {})
        self._clock = clock
        self._staged_at = clock()
        self._computed = 0
        self._read = False

    def add_to(self, trainer: Any, dataset: Any, name: str) -> Any:
        """The data set with TRL's two columns; `name` is `train` or `eval`.

        A row that the run never sees is not computed: it is not a number, so that it could not pass unseen.
        """
        import datasets

        if not self._read:
            self._kept = _shared(read(self._job.reference if _rank() == 0 else None, self._about))
            self._read = True
        data = self._data[name]
        values = self._kept.pairs(data, len(dataset))
        needed = _needed(trainer.args, self._job, data, len(dataset)) if name == "train" else None
        missing = np.flatnonzero(np.isnan(values).any(axis=1))
        missing = missing if needed is None else np.intersect1d(missing, needed)
        if len(missing):
            self._compute(trainer, dataset, missing, values)
        self._tell(name, len(dataset), len(missing))
        columns = datasets.Dataset.from_dict({column: values[:, at] for at, column in enumerate(COLUMNS)})
        return datasets.concatenate_datasets([dataset, columns], axis=1)

    @property
    def digest(self) -> str:
        """Of all values, as training sees them."""
        return self._kept.digest

    def _compute(self, trainer: Any, dataset: Any, missing: Numbers, values: Pairs) -> None:
        began, done = self._clock(), 0
        told = began
        with _frozen(trainer) as model:
            for batches in _groups(list(_batches(trainer, dataset, missing)), BATCHES_TOGETHER):
                mine = [_forward(trainer, model, dataset, batch) for batch in batches]
                done += _exchange(batches, mine, values, trainer.args)
                now = self._clock()
                if done < len(missing) and now - told >= TELL_EVERY_S:
                    told = now
                    _progress(done, len(missing), now - began)
                if done < len(missing) and now - self._staged_at >= STAGE_EVERY_S:
                    self._stage()
        self._computed += done
        seconds = self._clock() - began
        log.info("the reference's log-probabilities: %d pairs computed in %.1f s", done, seconds)

    def keep(self) -> None:
        """Stage all that is known, unless this run has it in the bucket. What another run computed is taken over:
        later attempts are to find the same bits, whatever becomes of that run.
        """
        if self._computed or self._kept.source != self._job.run_id:
            self._stage()

    def _stage(self) -> None:
        if _rank() == 0:
            stage(self._job.staging, self._kept)
        self._staged_at = self._clock()

    def _tell(self, name: str, pairs: int, computed: int) -> None:
        self._channel.say("reference", split=name, pairs=pairs, computed=computed)
        if not computed:
            log.info("the reference's log-probabilities of %d %s pairs are those that are kept", pairs, name)


def _needed(args: Any, job: Job, data: str, rows: int) -> Numbers | None:
    """Rows that a run of so many steps sees; None for all."""
    if args.max_steps <= 0:
        return None
    seen: list[Numbers] = []
    left, epoch = args.max_steps, 0
    seed = args.seed if args.data_seed is None else args.data_seed
    while left > 0 and sum(map(len, seen)) < rows * 4:  # by then all, or nearly
        order = (
            np.arange(rows)
            if args.train_sampling_strategy == "sequential"
            else shuffled(rows, seed=seed, epoch=epoch, data=data)
        )
        steps = dealt(order, job.recipe.global_batch_size, None)[:left]
        seen.append(np.unique(steps))
        left, epoch = left - len(steps), epoch + 1
    return None if left > 0 else np.unique(np.concatenate(seen))


def _batches(trainer: Any, dataset: Any, rows: Numbers) -> Iterator[LogpsBatch]:
    """Neighbours are of one length, the longest first: little is padding, and what does not fit is found at once."""
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
    """(pairs of this rank, 2). A rank without any computes another's: under ZeRO 3 all have to come."""
    mine = batch.rows[trainer.args.process_index]
    rows = [dataset[int(row)] for row in (mine if len(mine) else batch.rows[0][:1])]
    inputs = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
    values = torch.stack([chosen, rejected], dim=1).float()
    return values if len(mine) else values[:0]


def _exchange(batches: list[LogpsBatch], mine: list[torch.Tensor], values: Pairs, args: Any) -> int:
    """Write what all ranks have computed into every rank's `values`; how many rows that was."""
    rows = [np.concatenate([batch.rows[rank] for batch in batches]) for rank in range(args.world_size)]
    total = torch.zeros(sum(map(len, rows)), 2, dtype=torch.float32, device=args.device)
    first = sum(len(each) for each in rows[: args.process_index])
    total[first : first + len(rows[args.process_index])] = torch.cat(mine)
    if args.world_size > 1:
        dist.all_reduce(total)  # others have zeros where one has a value
    values[np.concatenate(rows)] = total.cpu().numpy()
    return len(total)


@contextmanager
def _frozen(trainer: Any) -> Iterator[Any]:
    """The policy before its first step, ready for a forward pass, and left as it was; no random number is drawn.

    DeepSpeed's parts are put together by an engine without an optimizer, as TRL does it; FSDP has a second set of them.
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
                engine.destroy()  # its hooks would gather for the next engine too
            trainer.model.train(training)


def _progress(done: int, of: int, seconds: float) -> None:
    rate = done / seconds
    log.info(
        "the reference's log-probabilities: %d of %d pairs, %.1f a second, %.1f min left",
        done, of, rate, (of - done) / rate / 60,
    )  # fmt: skip


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _shared(kept: CachedLogps) -> CachedLogps:
    """Rank 0's values on every rank; it alone stages, so no other asks where they are from."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return kept
    values = [kept.values]
    dist.broadcast_object_list(values, src=0)
    return CachedLogps(kept.about, values[0], source=kept.source)

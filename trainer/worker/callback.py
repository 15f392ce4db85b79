"""The callback of a training: it reports each step to the supervisor, stages checkpoints, and stops all ranks together."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from trainer.files import write_atomically
from trainer.job import Job
from trainer.staged import CHECKPOINT_FORMAT, STAGED_SUFFIX, Staged, mark_staged
from trainer.worker import engine
from trainer.worker.arguments import device_has_bf16
from trainer.worker.checkpoint import identity
from trainer.worker.checkpoint.identity import Identity
from trainer.worker.supervisor_channel import Channel

GIB = 2**30
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`: getrusage(2)."""
MAX_STAGED = 2
"""Staged folders on disk or tmpfs: one that is being uploaded, and one that waits. A third save is skipped."""
PER_PROCESS_METRICS = frozenset(
    {"num_tokens", "eval_num_tokens", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
)
"""Reset at every restart, so not reported."""
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""The inputs of the model that determine which tokens it sees."""


class Progress(TrainerCallback):
    """Reports a training to the supervisor. After `train()`, `stopped_at` is the step at which it was stopped, or None."""

    def __init__(self, job: Job, channel: Channel, about: Identity, *, samples: int) -> None:
        self.stopped_at: int | None = None
        self._job = job
        self._channel = channel
        self._about = about
        self._samples = samples
        self._trained = TrainedTokens()
        self._config = engine.config(job.recipe, job.fit, has_bf16=device_has_bf16(job.fit))
        self._timer = StepTimer()
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state contains the old intervals
        model.register_forward_pre_hook(self._trained.hook, with_kwargs=True)
        if args.world_size > 1:
            dist.barrier()  # before this, a signal ends each rank at once; after it, the ranks stop together
        self._channel.training_begins()
        self._channel.say(
            "started",
            step=state.global_step,
            total_steps=state.max_steps,
            samples=self._samples,
            tokens=self._about.tokens,
            parameters=sum(map(_size, model.parameters())),
            trainable_parameters=sum(_size(weight) for weight in model.parameters() if weight.requires_grad),
            **self._engine(),
        )
        self._timer.other()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if _evaluates_epochs(args) and _ends_epoch(state):
            control.should_evaluate = True
        if state.global_step < state.max_steps:  # the last step is always saved and finished
            full = control.should_save and self._staged_count() >= MAX_STAGED
            stop, full = _any_rank(args, self._channel.stop_asked, full)
            if stop:
                self._stop(state, control)
            elif full:
                control.should_save = False
                self._channel.say(
                    "save_skipped",
                    step=state.global_step,
                    reason=f"{MAX_STAGED} checkpoints still wait for upload: saves are faster than the uploads to the bucket",
                )
        self._since = time.perf_counter()
        return control

    def on_epoch_end(
        self, args: TrainingArguments, _state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Cancel the evaluation at the end of an epoch, because it ran at the epoch's last step.

        Transformers would run it after that step's save. A resume from that checkpoint would then lack its result and
        its random numbers. Transformers would also run it after a stop in the middle of an epoch.
        """
        if _evaluates_epochs(args):
            control.should_evaluate = False
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop now if a stop was requested during the evaluation, without another step."""
        if self.must_stop(args, state):
            self._stop(state, control)
        self._since = time.perf_counter()
        return control

    def must_stop(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Return whether a stop was requested on any rank. All ranks must call this. The last step is always finished."""
        return state.global_step < state.max_steps and _any_rank(args, self._channel.stop_asked)[0]

    def cut_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        """Save this step and stop; the checkpoint records that its evaluation is still due."""
        self._about = self._about.model_copy(update={"evaluation_due": True})
        control.should_evaluate = False
        self._stop(state, control)
        self._since = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Mark the checkpoint staged on each node, after every rank has written its part."""
        if args.world_size > 1:
            dist.barrier()
        folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        stall_s = time.perf_counter() - self._since
        size = 0
        if state.is_world_process_zero:
            identity.write(self._job.staging / folder, self._about)
            if self._config:
                file = self._job.staging / folder / f"{engine.config_name(self._job.fit)}.json"
                write_atomically(file, json.dumps(self._config, indent=2))
            files = filter(Path.is_file, (self._job.staging / folder).rglob("*"))
            size = sum(path.stat().st_size for path in files)
        if state.is_local_process_zero:
            details = self._about.model_dump(mode="json") | self._engine()
            mark_staged(
                self._job.staging,
                Staged(
                    folder=folder,
                    step=state.global_step,
                    format=CHECKPOINT_FORMAT,
                    stall_s=stall_s,
                    details=details,
                ),
            )
        self._channel.say("saved", step=state.global_step, bytes=size, stall_s=stall_s)
        self._timer.other()
        if self.must_stop(args, state):
            self._stop(state, control, save=False)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        state.log_history.clear()  # the events hold it; every save would write all of it again while training waits
        metrics = {key: value for key, value in (logs or {}).items() if key not in PER_PROCESS_METRICS}
        if "loss" in metrics:
            step_s = self._timer.step()
            taken = self._trained.take(args)
            self._channel.say(
                "step",
                step=state.global_step,
                total_steps=state.max_steps,
                samples=taken.samples,
                **metrics,
                step_s=step_s,
                train_s=self._timer.train_s,
                tokens_per_s=taken.tokens / step_s,
                gpu_peak_gib=taken.gpu_peak_gib,
                host_peak_gib=taken.host_peak_gib / self._job.fit.nodes,
            )
        elif any(key.startswith("eval_") for key in metrics):
            self._channel.say("eval", step=state.global_step, **metrics, seconds=self._timer.other())
        self._since = time.perf_counter()

    def _engine(self) -> dict[str, Any]:
        """Return the config of DeepSpeed or FSDP under its key; empty for other engines."""
        return {engine.config_name(self._job.fit): self._config} if self._config else {}

    def _staged_count(self) -> int:
        """Count the staged checkpoints by name, because the uploader may remove a marker at the same time."""
        return len(list(self._job.staging.glob(f"{PREFIX_CHECKPOINT_DIR}-*{STAGED_SUFFIX}")))

    def _stop(self, state: TrainerState, control: TrainerControl, *, save: bool = True) -> None:
        self.stopped_at = state.global_step
        control.should_save = save
        control.should_training_stop = True


def _evaluates_epochs(args: TrainingArguments) -> bool:
    return bool(args.eval_strategy == IntervalStrategy.EPOCH)


def _ends_epoch(state: TrainerState) -> bool:
    """Return whether a step is the last one of its epoch or of the run."""
    return state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()


def _size(weight: Any) -> int:
    """Return the number of elements, also for a weight that ZeRO 3 has partitioned."""
    return int(getattr(weight, "ds_numel", weight.numel()))


class Taken(NamedTuple):
    """What was trained in one step, over all ranks."""

    samples: str
    """Digest of the samples, in hexadecimal."""
    tokens: int
    gpu_peak_gib: float | None
    """Peak of the GPU that used the most memory; None without GPUs."""
    host_peak_gib: float
    """Sum over all ranks of all nodes."""


class TrainedTokens:
    """Digests the token ids that the model really trained on since the last step.

    The digest is the sum of a hash of each sequence. So a set of sequences has one digest, however it is distributed
    over ranks and micro batches, padded and ordered.
    """

    def __init__(self) -> None:
        self._fed: list[dict[str, torch.Tensor]] = []

    def hook(self, module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Remember the inputs of a training forward; those of evaluations and of the reference have no gradient.

        The inputs are hashed at the end of the step. Reading GPU memory here would wait for all queued kernels.
        """
        if module.training and torch.is_grad_enabled():
            self._fed.append(
                {name: inputs[name].detach() for name in TOKEN_INPUTS if inputs.get(name) is not None}
            )

    def take(self, args: TrainingArguments) -> Taken:
        """Return the digest and the token count of all ranks since the last call, and the peak memory."""
        mine, tokens = self._digest()
        gpu, host = peaks()
        if args.world_size > 1:
            signed = mine - 2**64 if mine >= 2**63 else mine
            total = torch.tensor([signed, tokens, host], dtype=torch.int64, device=args.device)
            dist.all_reduce(total)  # int64 wraps around, so this is the sum modulo 2 ** 64
            mine, tokens, host = (int(number) for number in total.tolist())
            mine %= 2**64
            gpu = _fullest(args, gpu)
        return Taken(f"{mine:016x}", tokens, gpu, host / GIB)

    def _digest(self) -> tuple[int, int]:
        """Return the sum of the hashes and the token count of the remembered inputs, and forget the inputs."""
        total = tokens = 0
        for fed in self._fed:
            for sequence in _sequences({name: tensor.cpu() for name, tensor in fed.items()}):
                tokens += len(sequence)
                total += xxhash.xxh3_64_intdigest(sequence.contiguous().numpy().tobytes())
        self._fed.clear()
        return total % 2**64, tokens


def _fullest(args: TrainingArguments, gib: float | None) -> float | None:
    """Return the maximum over all ranks. Either all ranks have a GPU, or none has."""
    if gib is None:
        return None
    largest = torch.tensor(gib, dtype=torch.float64, device=args.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _sequences(inputs: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield sequences without padding. A packed row holds several, and each has positions from 0."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    for number, row in enumerate(inputs["input_ids"].to(torch.int64)):  # (batch, sequence)
        if mask is not None:
            yield row[mask[number].bool()]
        elif positions is not None:
            starts = (positions[number] == 0).nonzero().flatten().tolist()
            yield from torch.tensor_split(row, starts[1:])
        else:
            yield row


def _any_rank(args: TrainingArguments, *flags: bool) -> tuple[bool, ...]:
    """Return each flag, true if it is true on any rank. Ranks that disagree would wait for each other for ever."""
    if args.world_size == 1:
        return flags
    raised = torch.tensor([float(flag) for flag in flags], device=args.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in raised.tolist())


class StepTimer:
    """Measures the time of training steps, without evaluations and saves."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self.train_s = 0.0
        """Seconds of all steps, including data loading and the loss."""

    def step(self) -> float:
        """Record the end of a step; return the seconds since the last step, evaluation or save ended."""
        took = self.other()
        self.train_s += took
        return took

    def other(self) -> float:
        """Record the end of an evaluation or a save; return the seconds since the last step, evaluation or save ended."""
        now = self._clock()
        took, self._since = now - self._since, now
        return took


class Peaks(NamedTuple):
    """Peak memory of this process since its start."""

    gpu_gib: float | None
    """GPU memory, including the CUDA context and NCCL's buffers; None on the CPU."""
    host_bytes: int
    """The largest resident set size."""


def peaks() -> Peaks:
    """Return the allocator's peak plus the memory outside of the allocator, which never shrinks."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
    if not torch.cuda.is_available():
        return Peaks(None, host)
    free, total = torch.cuda.mem_get_info()
    outside = max(0, total - free - torch.cuda.memory_reserved())
    return Peaks((torch.cuda.max_memory_reserved() + outside) / GIB, host)

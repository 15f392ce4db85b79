"""What happens at each step of training, told to the supervisor; saves it can upload; a stop all ranks agree on."""

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
from trainer.staged import STAGED_SUFFIX, Staged, mark_staged
from trainer.worker import checkpoint_identity, engine
from trainer.worker.arguments import device_has_bf16
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.supervisor_channel import Channel

MOST_PENDING = 2
"""Staged folders on disk or tmpfs: one being uploaded, one waiting. A third save is skipped instead."""
UNTOLD = frozenset(
    {"num_tokens", "eval_num_tokens", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
)
"""Of this process's life, not of the run's: they start anew at every recovery."""
FED = ("input_ids", "attention_mask", "position_ids")
"""Of the model's inputs, what says which tokens it sees."""


class Progress(TrainerCallback):
    """One per training; after `train()` it knows whether the training was stopped, and where."""

    def __init__(self, job: Job, channel: Channel, about: Identity, *, samples: int) -> None:
        self.stopped_at: int | None = None
        self._job = job
        self._channel = channel
        self._about = about
        self._samples = samples
        self._seen = TrainedTokens()
        self._config = engine.config(job.recipe, job.fit, has_bf16=device_has_bf16(job.fit))
        self._pace = StepTimer()
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state brings the old intervals
        model.register_forward_pre_hook(self._seen.hook, with_kwargs=True)
        if args.world_size > 1:
            dist.barrier()  # until all are here, a signal ends each at once; from here on they stop together
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
        self._pace.other()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if _evaluates_epochs(args) and _ends_epoch(state):
            control.should_evaluate = True
        if state.global_step < state.max_steps:  # the last step is saved and finished whatever happens
            full = control.should_save and self._waiting() >= MOST_PENDING
            stop, full = _any_rank(args, self._channel.stop_asked, full)
            if stop:
                self._stop(state, control)
            elif full:
                control.should_save = False
                self._channel.say(
                    "save_skipped",
                    step=state.global_step,
                    reason=f"{MOST_PENDING} checkpoints still wait for upload: saves come faster than the bucket takes them",
                )
        self._since = time.perf_counter()
        return control

    def on_epoch_end(
        self, args: TrainingArguments, _state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Its evaluation was its last step's. Transformers would do it now, after that step's save, so that whoever
        goes on from there has neither its result nor its random numbers; and after a stop in the middle of an epoch.
        """
        if _evaluates_epochs(args):
            control.should_evaluate = False
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """A stop that is asked for meanwhile needs no step more."""
        if self.must_stop(args, state):
            self._stop(state, control)
        self._since = time.perf_counter()
        return control

    def must_stop(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether any rank was asked to; every rank has to ask. The last step is saved and finished whatever happens."""
        return state.global_step < state.max_steps and _any_rank(args, self._channel.stop_asked)[0]

    def cut_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        """Save this step instead, and stop."""
        self._about = self._about.model_copy(update={"evaluation_due": True})
        control.should_evaluate = False
        self._stop(state, control)
        self._since = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """The folder is whole once every rank has written its part of it; each node has its own."""
        if args.world_size > 1:
            dist.barrier()
        folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        stall_s = time.perf_counter() - self._since
        size = 0
        if state.is_world_process_zero:
            checkpoint_identity.write(self._job.staging / folder, self._about)
            if self._config:
                file = self._job.staging / folder / f"{engine.config_name(self._job.fit)}.json"
                write_atomically(file, json.dumps(self._config, indent=2))
            files = filter(Path.is_file, (self._job.staging / folder).rglob("*"))
            size = sum(path.stat().st_size for path in files)
        if state.is_local_process_zero:
            details = self._about.model_dump(mode="json") | self._engine()
            mark_staged(
                self._job.staging,
                Staged(folder=folder, step=state.global_step, stall_s=stall_s, details=details),
            )
        self._channel.say("saved", step=state.global_step, bytes=size, stall_s=stall_s)
        self._pace.other()
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
        state.log_history.clear()  # told below; every save would write all of it again, while training waits
        told = {key: value for key, value in (logs or {}).items() if key not in UNTOLD}
        if "loss" in told:
            step_s = self._pace.step()
            seen = self._seen.take(args)
            self._channel.say(
                "step",
                step=state.global_step,
                total_steps=state.max_steps,
                samples=seen.samples,
                **told,
                step_s=step_s,
                train_s=self._pace.train_s,
                tokens_per_s=seen.tokens / step_s,
                gpu_peak_gib=seen.gpu_peak_gib,
                host_peak_gib=seen.host_peak_gib / self._job.fit.nodes,
            )
        elif any(key.startswith("eval_") for key in told):
            self._channel.say("eval", step=state.global_step, **told, seconds=self._pace.other())
        self._since = time.perf_counter()

    def _engine(self) -> dict[str, Any]:
        """DeepSpeed's config or FSDP's, if one trains."""
        return {engine.config_name(self._job.fit): self._config} if self._config else {}

    def _waiting(self) -> int:
        """Staged checkpoints, by name only: the uploader may remove a marker while we look."""
        return len(list(self._job.staging.glob(f"{PREFIX_CHECKPOINT_DIR}-*{STAGED_SUFFIX}")))

    def _stop(self, state: TrainerState, control: TrainerControl, *, save: bool = True) -> None:
        self.stopped_at = state.global_step
        control.should_save = save
        control.should_training_stop = True


def _evaluates_epochs(args: TrainingArguments) -> bool:
    return bool(args.eval_strategy == IntervalStrategy.EPOCH)


def _ends_epoch(state: TrainerState) -> bool:
    """Whether a step is its epoch's last, or the run's."""
    return state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()


def _size(weight: Any) -> int:
    """Elements, also of a weight that ZeRO 3 has cut."""
    return int(getattr(weight, "ds_numel", weight.numel()))


class Taken(NamedTuple):
    """A step over all ranks."""

    samples: str
    """Hex."""
    tokens: int
    gpu_peak_gib: float | None
    """Of the fullest GPU."""
    host_peak_gib: float
    """Of all nodes."""


class TrainedTokens:
    """What the model was trained on since the last look: token ids, not what was meant to be fed to it.

    The sum of a hash of each sequence: a set of sequences has one digest, however it was dealt to ranks and micro
    batches, padded and ordered.
    """

    def __init__(self) -> None:
        self._fed: list[dict[str, torch.Tensor]] = []

    def hook(self, module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Before a forward; those of evaluation and of the reference have no gradient.

        Only kept until the step is over: to read a GPU's memory here would wait for all that it has still to compute.
        """
        if module.training and torch.is_grad_enabled():
            self._fed.append({name: inputs[name].detach() for name in FED if inputs.get(name) is not None})

    def take(self, args: TrainingArguments) -> Taken:
        """All since the last call, of every rank; and the memory that they took at most."""
        mine, tokens = self._digest()
        gpu, host = peaks()
        if args.world_size > 1:
            signed = mine - 2**64 if mine >= 2**63 else mine
            total = torch.tensor([signed, tokens, host], dtype=torch.int64, device=args.device)
            dist.all_reduce(total)  # modulo 2 ** 64, as int64 overflows
            mine, tokens, host = (int(number) for number in total.tolist())
            mine %= 2**64
            gpu = _fullest(args, gpu)
        return Taken(f"{mine:016x}", tokens, gpu, host / GIB)

    def _digest(self) -> tuple[int, int]:
        """Sum of the hashes, and tokens, of what was fed; it is let go."""
        total = tokens = 0
        for fed in self._fed:
            for sequence in _sequences({name: tensor.cpu() for name, tensor in fed.items()}):
                tokens += len(sequence)
                total += xxhash.xxh3_64_intdigest(sequence.contiguous().numpy().tobytes())
        self._fed.clear()
        return total % 2**64, tokens


def _fullest(args: TrainingArguments, gib: float | None) -> float | None:
    """The largest of all ranks; they all have a GPU, or none has."""
    if gib is None:
        return None
    largest = torch.tensor(gib, dtype=torch.float64, device=args.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _sequences(inputs: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Without padding; several to a row where they are packed, each with positions from 0."""
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
    """Each flag, raised if any rank raises it: ranks that disagree would wait for each other for ever."""
    if args.world_size == 1:
        return flags
    raised = torch.tensor([float(flag) for flag in flags], device=args.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in raised.tolist())


GIB = 2**30
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""Of `ru_maxrss`: getrusage(2)."""


class StepTimer:
    """A stopwatch that is held while training does something else than steps."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self.train_s = 0.0
        """Of all steps, their data and their loss included."""

    def step(self) -> float:
        """Seconds since the last step, evaluation or save was over; a step ends here."""
        took = self.other()
        self.train_s += took
        return took

    def other(self) -> float:
        """The same of what is no step."""
        now = self._clock()
        took, self._since = now - self._since, now
        return took


class Peaks(NamedTuple):
    """Of this process since it began."""

    gpu_gib: float | None
    """What lies on its GPU, the CUDA context and NCCL's buffers included; None on the CPU."""
    host_bytes: int
    """The most that was resident."""


def peaks() -> Peaks:
    """CUDA's allocator knows its own peak; what lies outside of it stays, once it is there."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
    if not torch.cuda.is_available():
        return Peaks(None, host)
    free, total = torch.cuda.mem_get_info()
    outside = max(0, total - free - torch.cuda.memory_reserved())
    return Peaks((torch.cuda.max_memory_reserved() + outside) / GIB, host)

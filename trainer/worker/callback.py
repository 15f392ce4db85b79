"""What happens at each step of training, told to the supervisor; saves it can upload; a stop all ranks agree on."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer.job import STAGED_SUFFIX, Job, Staged, mark_staged
from trainer.worker import resume
from trainer.worker.channel import Channel
from trainer.worker.resume import Identity

MOST_PENDING = 2
"""Staged folders on disk or tmpfs: one being uploaded, one waiting. A third save is skipped instead."""
UNTOLD = frozenset(
    {"num_tokens", "eval_num_tokens", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
)
"""Of this process's life, not of the run's: they start anew at every recovery."""


class Progress(TrainerCallback):
    """One per training; after `train()` it knows whether the training was stopped, and where."""

    def __init__(self, job: Job, channel: Channel, about: Identity, *, samples: int) -> None:
        self.stopped_at: int | None = None
        self._job = job
        self._channel = channel
        self._about = about
        self._samples = samples
        self._seen = Seen()
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state brings the old intervals
        model.register_forward_pre_hook(self._seen.hook, with_kwargs=True)
        self._channel.training_begins()
        self._channel.say(
            "started",
            step=state.global_step,
            total_steps=state.max_steps,
            samples=self._samples,
            tokens=self._about.tokens,
            parameters=sum(weight.numel() for weight in model.parameters()),
            trainable_parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
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

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """An evaluation is finished even when a stop is asked for: it draws random numbers, and a resumed
        run must not be short of them. What it was followed by is not waited for.
        """
        if state.global_step < state.max_steps and _any_rank(args, self._channel.stop_asked)[0]:
            self._stop(state, control)
        self._since = time.perf_counter()
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """The folder is whole once every rank has written its part of it."""
        if args.world_size > 1:
            dist.barrier()
        folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        stall_s = time.perf_counter() - self._since
        if state.is_world_process_zero:
            resume.write(self._job.staging / folder, self._about)
            details = self._about.model_dump(mode="json")
            mark_staged(
                self._job.staging,
                Staged(folder=folder, step=state.global_step, stall_s=stall_s, details=details),
            )
        self._channel.say("saved", step=state.global_step, stall_s=stall_s)
        if state.global_step < state.max_steps and _any_rank(args, self._channel.stop_asked)[0]:
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
        told = {key: value for key, value in (logs or {}).items() if key not in UNTOLD}
        if "loss" in told:
            samples = self._seen.digest(args)
            self._channel.say(
                "step", step=state.global_step, total_steps=state.max_steps, samples=samples, **told
            )
        elif any(key.startswith("eval_") for key in told):
            self._channel.say("eval", step=state.global_step, **told)
        self._since = time.perf_counter()

    def _waiting(self) -> int:
        """Staged folders, by name only: the uploader may remove a marker while we look."""
        return len(list(self._job.staging.glob(f"*{STAGED_SUFFIX}")))

    def _stop(self, state: TrainerState, control: TrainerControl, *, save: bool = True) -> None:
        self.stopped_at = state.global_step
        control.should_save = save
        control.should_training_stop = True


class Seen:
    """What the model was trained on since the last look: token ids, not what was meant to be fed to it."""

    def __init__(self) -> None:
        self._total = xxhash.xxh3_64()

    def hook(self, module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Before a forward; those of evaluation and of the reference have no gradient."""
        if module.training and torch.is_grad_enabled():
            ids = inputs["input_ids"].detach().cpu()  # (batch, sequence)
            self._total.update(str(tuple(ids.shape)).encode())
            self._total.update(ids.contiguous().numpy().tobytes())

    def digest(self, args: TrainingArguments) -> str:
        """Hex over all since the last call; over every rank's, in the order of ranks, if there are several."""
        mine = self._total.digest()
        self._total.reset()
        if args.world_size == 1:
            return mine.hex()
        parts = [
            torch.zeros(len(mine), dtype=torch.uint8, device=args.device) for _ in range(args.world_size)
        ]
        dist.all_gather(parts, torch.tensor(list(mine), dtype=torch.uint8, device=args.device))
        return xxhash.xxh3_64_hexdigest(b"".join(bytes(part.tolist()) for part in parts))


def _any_rank(args: TrainingArguments, *flags: bool) -> tuple[bool, ...]:
    """Each flag, raised if any rank raises it: ranks that disagree would wait for each other for ever."""
    if args.world_size == 1:
        return flags
    raised = torch.tensor([float(flag) for flag in flags], device=args.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in raised.tolist())

"""A rank that trains a small model in bf16 under ZeRO, and brings what it saved into every other form.

In place of `trainer.worker`: TRL would not have DeepSpeed train in bf16 on a CPU, which DeepSpeed itself does. Writes
what differs, in words, into the outcome.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer.fit import Fit
from trainer.job import Job, Outcome
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.engine import deepspeed_config
from trainer.worker.reshard.checkpoint_state import CheckpointState
from trainer.worker.reshard.deepspeed_checkpoint import ZeroState
from trainer.worker.reshard.fill import fill
from trainer.worker.reshard.optimizer_layout import find_target, finish_load
from trainer.worker.supervisor_channel import Channel

WIDTHS = (7, 33, 5)  # nothing of it is a multiple of the ranks
STEPS = 3
FORMS = (("zero2", False), ("zero3", False), ("zero2", True), ("zero3", True))


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    first, second = torch.nn.Linear(WIDTHS[0], WIDTHS[1]), torch.nn.Linear(WIDTHS[1], WIDTHS[2])
    return torch.nn.Sequential(first, torch.nn.LayerNorm(WIDTHS[1]), second)


def optimizer_of(model: Any) -> Any:
    """With the matrices in one group, and the rest without decay in another, as Transformers has it."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def engine_of(job: Job, fit: Fit, seed: int) -> Any:
    """A DeepSpeed engine, with what of a trainer is looked at."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    recipe = job.recipe.model_copy(update={"trainer_args": {**job.recipe.trainer_args, "bf16": True}})
    config = deepspeed_config(recipe, fit, has_bf16=True)
    assert config is not None
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 40
    config["zero_optimization"]["sub_group_size"] = 60
    model = model_of(seed)
    optimizer = optimizer_of(model)
    if fit.offload_optimizer:
        optimizer = DeepSpeedCPUAdam(optimizer.param_groups, lr=1e-2, adamw_mode=True)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return SimpleNamespace(model=made.module, deepspeed=made)


def step(trainer: Any, number: int) -> None:
    torch.manual_seed(number)
    inputs = torch.randn(4, WIDTHS[0], dtype=torch.bfloat16)
    trainer.deepspeed.backward(trainer.deepspeed(inputs).float().square().mean())
    trainer.deepspeed.step()


def numbers(trainer: Any, engine: str) -> dict[str, Any]:
    """All that is trained on this rank, as (name, first element): masters, moments, steps, decay."""
    ready = find_target(trainer, engine)
    decays = {name: group.settings["weight_decay"] for group in ready.groups for name in group.names}
    found: dict[str, Any] = {}
    for stepped in ready.stepped:
        state = ready.optimizer.state[stepped.tensor]
        for part in stepped.parts:
            for key, flat in (
                ("weights", stepped.tensor),
                *((k, state[k]) for k in ("exp_avg", "exp_avg_sq")),
            ):
                found[f"{part.name} {key}"] = (
                    part.start,
                    flat.view(-1)[part.offset : part.offset + part.size],
                )
            found[f"{part.name} step"] = float(state["step"])
            found[f"{part.name} decay"] = decays[part.name]
    return found


def differences(trainer: Any, engine: str, saved: CheckpointState) -> list[str]:
    """Return what an engine holds that differs from what was saved; nothing may be rounded."""
    wrong = []
    for what, held in numbers(trainer, engine).items():
        name, key = what.split()
        if key == "step":
            wrong += [what] if held != STEPS else []
        elif key == "decay":
            wrong += [what] if held != (0.3 if name in ("0.weight", "2.weight") else 0.0) else []
        else:
            wanted = torch.empty_like(held[1])
            saved.copy(key, name, held[0], wanted)
            wrong += [] if torch.equal(wanted, held[1]) else [what]
    return wrong


def model_weights(trainer: Any) -> dict[str, Any]:
    from deepspeed.runtime.zero import GatheredParameters

    whole = {}
    for name, weight in trainer.model.named_parameters():
        with GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            whole[name] = weight.detach().clone()
    return whole


def one(job: Job, form: tuple[str, bool]) -> Fit:
    update = {"engine": form[0], "offload_optimizer": form[1]}
    return Fit.model_validate({**job.fit.model_dump(), **update})


def into_whole(saved: CheckpointState) -> list[str]:
    """Float32 weights, as one process trains them."""
    model = model_of(9)
    wrapped = SimpleNamespace(optimizer=optimizer_of(model))
    trainer = SimpleNamespace(model=model, optimizer=wrapped)
    fill(find_target(trainer, "single"), saved)
    return differences(trainer, "single", saved)


def compare(job: Job, written: tuple[str, bool]) -> list[str]:
    """Train and save in one form, and go on in all others."""
    fit = one(job, written)
    trainer = engine_of(job, fit, seed=1)
    for number in range(STEPS):
        step(trainer, number)
    folder = job.staging / f"{written[0]}-{written[1]}"
    trainer.deepspeed.save_checkpoint(str(folder), tag="global_step3")
    about = Identity.model_construct(engine=written[0], world_size=job.fit.processes)
    saved = ZeroState(Path(folder), about)
    weights = model_weights(trainer)
    wrong = [f"{written} to whole: {each}" for each in into_whole(saved)]
    for form in FORMS:
        other = engine_of(job, one(job, form), seed=2)
        fill(find_target(other, form[0]), saved)
        finish_load(other, form[0], step=STEPS, scale=None)
        wrong += [f"{written} to {form}: {each}" for each in differences(other, form[0], saved)]
        same = all(torch.equal(weights[name], weight) for name, weight in model_weights(other).items())
        wrong += [] if same else [f"{written} to {form}: the bf16 weights"]
        step(other, STEPS)
    return wrong


if __name__ == "__main__":
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    channel = Channel(job, rank=int(os.environ["RANK"]))
    wrong = [each for form in FORMS for each in compare(job, form)]
    channel.conclude(Outcome(status="user_error" if wrong else "done", message="; ".join(wrong)))

"""A rank of four that trains a small model in bf16 under FSDP 2, and reads what all have saved.

In place of `trainer.worker`: nothing of the model is a multiple of the ranks, and the last one has none of some weights.
Writes what differs, in words, into the outcome.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trainer.job import Job, Outcome
from trainer.worker.reshard.checkpoint_state import WEIGHTS
from trainer.worker.reshard.fill import fill
from trainer.worker.reshard.fsdp_checkpoint import MODEL, OPTIMIZER, FsdpState
from trainer.worker.reshard.optimizer_layout import find_target
from trainer.worker.supervisor_channel import Channel

WIDTHS = (7, 33, 5)
STEPS = 3
KEYS = (WEIGHTS, "exp_avg", "exp_avg_sq")


def trainer_of(seed: int) -> Any:
    """What of a trainer is looked at."""
    torch.manual_seed(seed)
    first, second = torch.nn.Linear(WIDTHS[0], WIDTHS[1]), torch.nn.Linear(WIDTHS[1], WIDTHS[2])
    model = torch.nn.Sequential(first, torch.nn.LayerNorm(WIDTHS[1]), second)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16))
    wrapped = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    return SimpleNamespace(model=model, optimizer=wrapped)


def step(trainer: Any, number: int) -> None:
    torch.manual_seed(number)
    trainer.model(torch.randn(4, WIDTHS[0])).float().square().mean().backward()
    trainer.optimizer.optimizer.step()
    trainer.optimizer.optimizer.zero_grad()


def save(trainer: Any, folder: Path) -> None:
    """As Accelerate does it."""
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / MODEL)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / OPTIMIZER)


def whole(trainer: Any) -> dict[tuple[str, str], Any]:
    """All that is trained, put together by torch; by parameter and key."""
    found = {}
    for name, weight in trainer.model.named_parameters():
        state = trainer.optimizer.optimizer.state[weight]
        for key in KEYS:
            found[name, key] = (weight if key == WEIGHTS else state[key]).full_tensor().detach()
    return found


def differences(saved: FsdpState, wanted: dict[tuple[str, str], Any]) -> list[str]:
    """Return what is read, from the first element and from one in the middle."""
    wrong = []
    for (name, key), tensor in wanted.items():
        flat = tensor.reshape(-1)
        for start in (0, len(flat) // 3):
            read = torch.empty(len(flat) - start)
            saved.copy(key, name, start, read)
            wrong += [] if torch.equal(read, flat[start:]) else [f"{key} of {name} from {start}"]
        wrong += [] if float(saved.shared(name)["step"]) == STEPS else [f"step of {name}"]
    return wrong


def compare(folder: Path) -> list[str]:
    trained = trainer_of(1)
    for number in range(STEPS):
        step(trained, number)
    save(trained, folder)
    wanted = whole(trained)
    saved = FsdpState(folder, [[name] for name, _ in trained.model.named_parameters()])
    wrong = differences(saved, wanted)
    other = trainer_of(2)
    fill(find_target(other, "fsdp2"), saved)
    filled = whole(other)
    wrong += [
        f"{each} after it was filled"
        for each, tensor in wanted.items()
        if not torch.equal(tensor, filled[each])
    ]
    wrong += [f"rates {saved.rates}"] if saved.rates != (1e-2,) else []
    step(trained, STEPS)
    step(other, STEPS)
    after = whole(other)
    wrong += [
        f"{each} a step later"
        for each, tensor in whole(trained).items()
        if not torch.equal(tensor, after[each])
    ]
    return wrong


if __name__ == "__main__":
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wrong = compare(job.staging / "checkpoint-3")
    Channel(job, rank=int(os.environ["RANK"])).conclude(
        Outcome(status="user_error" if wrong else "done", message="; ".join(wrong))
    )
    dist.destroy_process_group()

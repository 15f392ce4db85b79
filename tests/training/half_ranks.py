"""Ranks that train a small model in every form, save it with our writer, and bring it into every other form.

They replace `trainer.worker`. TRL refuses to train in bf16 on a CPU under DeepSpeed, and DeepSpeed itself does not.
Nothing in the model is a multiple of the ranks, and the last rank has no part of some weights.
Under `zero3` the forms of DeepSpeed are included, which need a compiler. The outcome has every difference in words.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open

from trainer.fit import Fit
from trainer.job import Job, Outcome
from trainer.worker.checkpoint.format import RANK_FILES, open_format_2
from trainer.worker.checkpoint.load import Filler, finish
from trainer.worker.checkpoint.optimizer_layout import find_target
from trainer.worker.checkpoint.save import CheckpointWriter
from trainer.worker.checkpoint.state import WEIGHTS, SavedState
from trainer.worker.engine import deepspeed_config
from trainer.worker.supervisor_channel import Channel

WIDTHS = (7, 33, 5)
STEPS = 3
RATE, DECAY = 1e-2, 0.3
MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 12
"""A float32 value and AdamW's two moments."""
Values = dict[tuple[str, str], Any]
"""Whole tensors by parameter and key."""


class Form(NamedTuple):
    """An engine, and whether its optimizer is offloaded."""

    engine: str
    offloaded: bool = False

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")


WITHOUT_COMPILER = (Form("ddp"), Form("fsdp2"))
ZERO = (Form("zero2"), Form("zero3"), Form("zero2", offloaded=True), Form("zero3", offloaded=True))


def model_of(seed: int) -> Any:
    """Return a model that has what a writer asks of it, and a buffer that is saved with its weights."""
    torch.manual_seed(seed)
    first, second = torch.nn.Linear(WIDTHS[0], WIDTHS[1]), torch.nn.Linear(WIDTHS[1], WIDTHS[2])
    model: Any = torch.nn.Sequential(first, torch.nn.LayerNorm(WIDTHS[1]), second)
    model.register_buffer("seen", torch.full((3,), float(seed)))
    model.config = SimpleNamespace(dtype=torch.bfloat16, save_pretrained=lambda _folder: None)
    model.can_generate = lambda: False
    return model


def optimizer_of(model: Any) -> Any:
    """Return AdamW. The matrices are one group; the rest is another one without decay, as in Transformers."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE)


def trainer_of(job: Job, form: Form, seed: int) -> Any:
    """Return what the checkpoint code reads of a trainer, with model and optimizer prepared."""
    args = SimpleNamespace(
        process_index=dist.get_rank(), world_size=dist.get_world_size(), output_dir=str(job.staging)
    )
    trainer = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(scaler=None),
        lr_scheduler=SimpleNamespace(state_dict=dict),
        processing_class=SimpleNamespace(save_pretrained=lambda _folder: None),
    )
    if form.is_zero:
        trainer.deepspeed = deepspeed_engine(job, form, seed)
        trainer.model = trainer.deepspeed.module
        return trainer
    trainer.model = model_of(seed)
    if form.engine == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        fully_shard(trainer.model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16))
    trainer.optimizer = SimpleNamespace(optimizer=optimizer_of(trainer.model))
    return trainer


def deepspeed_engine(job: Job, form: Form, seed: int) -> Any:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    fit = Fit.model_validate(
        {**job.fit.model_dump(), "engine": form.engine, "offload_optimizer": form.offloaded}
    )
    recipe = job.recipe.model_copy(update={"trainer_args": {**job.recipe.trainer_args, "bf16": True}})
    config = deepspeed_config(recipe, fit, has_bf16=True)
    assert config is not None
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 40
    config["zero_optimization"]["sub_group_size"] = 60
    model = model_of(seed)
    optimizer = optimizer_of(model)
    if form.offloaded:
        optimizer = DeepSpeedCPUAdam(optimizer.param_groups, lr=RATE, adamw_mode=True)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return made


def step(trainer: Any, form: Form, number: int) -> None:
    """Train on the same inputs on every rank, so that replicas stay equal."""
    torch.manual_seed(number)
    inputs = torch.randn(4, WIDTHS[0])
    if form.is_zero:
        trainer.deepspeed.backward(trainer.deepspeed(inputs.bfloat16()).float().square().mean())
        trainer.deepspeed.step()
        return
    trainer.model(inputs).float().square().mean().backward()
    trainer.optimizer.optimizer.step()
    trainer.optimizer.optimizer.zero_grad()


def values_of(trainer: Any, form: Form) -> Values:
    """Return masters and moments, put together by torch or DeepSpeed and not by our own code."""
    if form.engine == "zero2":
        relink(trainer.deepspeed.optimizer)
    found: Values = {}
    for name, weight in trainer.model.named_parameters():
        for key in (WEIGHTS, *MOMENTS):
            found[name, key] = value_of(trainer, form, weight, key).detach().clone()
    return found


def relink(zero: Any) -> None:
    """Make DeepSpeed find the moments. It looks for them after the first group's step, before other groups have any."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def value_of(trainer: Any, form: Form, weight: Any, key: str) -> Any:
    if form.is_zero:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key == WEIGHTS:
            return safe_get_full_fp32_param(weight)
        return safe_get_full_optimizer_state(weight, key)
    value = weight if key == WEIGHTS else trainer.optimizer.optimizer.state[weight][key]
    return value.full_tensor() if form.engine == "fsdp2" else value


def model_weights(trainer: Any, form: Form) -> Values:
    """Return the weights with which the model computes: bf16 under DeepSpeed."""
    if not form.is_zero:
        return {}
    from deepspeed.runtime.zero import GatheredParameters

    whole: Values = {}
    for name, weight in trainer.model.named_parameters():
        with GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            whole[name, "bf16"] = weight.detach().clone()
    return whole


def different(one: Values, other: Values) -> list[str]:
    """Return what is not equal bit for bit."""
    wrong = [f"{key} of {name}" for name, key in one.keys() ^ other.keys()]
    pairs = ((each, one[each], other[each]) for each in one.keys() & other.keys())
    return wrong + [
        f"{key} of {name}" for (name, key), mine, theirs in pairs if not torch.equal(mine, theirs)
    ]


def read_back(saved: SavedState, trained: Values) -> list[str]:
    """Return what the files have wrong, read from the first element on and from one in the middle."""
    wrong = []
    for (name, key), tensor in trained.items():
        flat = tensor.reshape(-1)
        for start in (0, len(flat) // 3):
            read = torch.empty(len(flat) - start)
            saved.parameters[name].copy(key, start, read)
            wrong += [] if torch.equal(read, flat[start:]) else [f"{key} of {name} from {start} in the files"]
    counted = {name: float(saved.shared(name)["step"]) for name, _ in trained}
    wrong += [f"the step of {name}: {count}" for name, count in counted.items() if count != STEPS]
    wrong += [f"the rates {saved.rates}"] if saved.rates != (RATE, RATE) else []
    return wrong


def bytes_of(folder: Path, trained: Values) -> list[str]:
    """Return how the bytes differ from 12 per parameter. Random numbers and the model's buffer come on top."""
    total = 0
    for path in folder.glob(RANK_FILES):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith("random/")]  # noqa: SIM118
            total += sum(file.get_tensor(name).nbytes for name in names if name != f"{WEIGHTS}/seen")
    count = sum(tensor.numel() for (_, key), tensor in trained.items() if key == WEIGHTS)
    return [] if total == BYTES_PER_PARAMETER * count else [f"{total} bytes for {count} parameters"]


def settings_of(trainer: Any, form: Form) -> list[str]:
    """Return which steps and decays are wrong in the optimizer."""
    target = find_target(trainer, form.engine)
    steps = {float(target.optimizer.state[each.tensor]["step"]) for each in target.stepped}
    decays = {name: group.settings["weight_decay"] for group in target.groups for name in group.names}
    wrong = [] if steps == {STEPS} else [f"the steps {steps}"]
    return wrong + [
        f"the decay of {name}: {decay}"
        for name, decay in decays.items()
        if decay != (DECAY if name in ("0.weight", "2.weight") else 0.0)
    ]


def compare(job: Job, written: Form, forms: tuple[Form, ...]) -> list[str]:
    """Train and save in one form, and continue in all forms. Only in the own form is the next step the same to the bit."""
    trainer = trainer_of(job, written, seed=1)
    writer = CheckpointWriter(trainer, written.engine, find_target(trainer, written.engine))
    for number in range(STEPS):
        step(trainer, written, number)
    folder = job.staging / f"{written.engine}-{written.offloaded}"
    writer.write(folder)
    dist.barrier()
    trained, computing = values_of(trainer, written), model_weights(trainer, written)
    saved = open_format_2(folder)
    wrong = read_back(saved, trained) + bytes_of(folder, trained)
    step(trainer, written, STEPS)
    for form in forms:
        other = trainer_of(job, form, seed=2)
        target = find_target(other, form.engine)
        Filler(target, saved, rank=dist.get_rank(), same_form=form == written).fill()
        finish(other, form.engine, saved, step=STEPS)
        found = different(trained, values_of(other, form)) + settings_of(other, form)
        if computing and form.is_zero:
            found += different(computing, model_weights(other, form))
        if not torch.equal(other.model.seen.float(), torch.ones(3)):
            found.append("the model's buffer")
        step(other, form, STEPS)
        if form == written:
            after = different(values_of(trainer, form), values_of(other, form))
            found += [f"{each} a step later" for each in after]
        wrong += [f"to {form}: {each}" for each in found]
    return [f"{written} {each}" for each in wrong]


def main(job: Job, forms: tuple[Form, ...], start: Callable[[str], None]) -> None:
    torch.set_num_threads(1)
    start("gloo")
    wrong = [each for form in forms for each in compare(job, form, forms)]
    Channel(job, rank=int(os.environ["RANK"])).conclude(
        Outcome(status="user_error" if wrong else "done", message="; ".join(wrong))
    )
    dist.destroy_process_group()


def examine_processor_once() -> None:
    """Cache what py-cpuinfo finds. DeepSpeed asks it for every optimizer on the host, which takes seconds."""
    import cpuinfo

    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


if __name__ == "__main__":
    told = Job.model_validate_json(Path(sys.argv[1]).read_text())
    if told.fit.is_zero:
        import deepspeed

        examine_processor_once()
        main(told, (*ZERO, *WITHOUT_COMPILER), deepspeed.init_distributed)
    else:
        main(told, WITHOUT_COMPILER, dist.init_process_group)

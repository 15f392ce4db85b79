"""A checkpoint has every parameter of every engine where its index says, and what a rank draws after a change."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training import forks
from tests.training.ranks import finish, ranks_job
from tests.training.test_engines import needs_compiler
from trainer.errors import UserError
from trainer.job import Outcome
from trainer.worker.checkpoint import load
from trainer.worker.checkpoint.format_1 import (
    DCP_INDEX,
    DcpFolder,
    Place,
    pieces_of_stage_2,
    pieces_of_stage_3,
)
from trainer.worker.checkpoint.identity import Identity
from trainer.worker.checkpoint.save import scaler_state, split_state
from trainer.worker.checkpoint.trainer_mixin import CheckpointForm, reseed

COUNTS = [12, 1, 7, 30, 2]


def identity(engine: str, ranks: int, **more: Any) -> Identity:
    return Identity(
        data="d",
        tokens=1,
        model="m",
        engine=engine,
        world_size=ranks,
        micro_batch=1,
        accumulation=1,
        threads=1,
        **more,
    )


def gathered(places: list[Place], flats: list[torch.Tensor]) -> list[float]:
    numbers = [flats[rank][offset : offset + size] for rank, offset, _, size in places]
    return [float(each) for each in torch.cat(numbers)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_pieces_of_stage_3_are_where_deepspeed_cuts(ranks: int) -> None:
    """Each parameter is padded to a multiple of the ranks and split, even one with fewer elements than ranks."""
    weights = [torch.arange(count, dtype=torch.float64) + 100 * number for number, count in enumerate(COUNTS)]
    padded = [torch.nn.functional.pad(weight, (0, -len(weight) % ranks), value=-1) for weight in weights]
    flats = [torch.cat([weight.chunk(ranks)[rank] for weight in padded]) for rank in range(ranks)]
    for weight, places in zip(weights, pieces_of_stage_3(COUNTS, ranks), strict=True):
        assert gathered(places, flats) == weight.tolist()
        assert [start for _, _, start, _ in places] == starts(places)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("alignment", [1, 4])
def test_pieces_of_stage_2_are_where_deepspeed_cuts(ranks: int, alignment: int) -> None:
    """A group's parameters are aligned, concatenated, padded at the end, and split into equal partitions."""
    weights = [torch.arange(count, dtype=torch.float64) + 100 * number for number, count in enumerate(COUNTS)]
    paddings = [*(-count % alignment for count in COUNTS[:-1]), 0]
    laid = [
        torch.nn.functional.pad(weight, (0, pad), value=-1)
        for weight, pad in zip(weights, paddings, strict=True)
    ]
    flat = torch.cat(laid)
    flats = list(torch.nn.functional.pad(flat, (0, -len(flat) % (2 * ranks)), value=-1).chunk(ranks))
    found = pieces_of_stage_2(COUNTS, paddings, len(flats[0]))
    for weight, places in zip(weights, found, strict=True):
        assert gathered(places, flats) == weight.tolist()
        assert [start for _, _, start, _ in places] == starts(places)


def starts(places: list[Place]) -> list[int]:
    sizes = [size for *_, size in places]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def compared(work: Path, **fit: Any) -> tuple[int, str, str]:
    """Return how the ranks of `half_ranks` ended, with every difference that they found."""
    job = ranks_job(work, "zephyr-tiny/sft", **fit)
    code = finish(forks.workers(job, "tests.training.half_ranks"))
    outcome = Outcome.model_validate_json(job.outcome.read_text())
    return code, outcome.status, outcome.message


@needs_compiler
def test_every_form_goes_into_every_form(tmp_path: Path) -> None:
    """ZeRO-2 and ZeRO-3 in bf16, with and without offload, FSDP2 and DDP convert into each other on 2 ranks.

    Masters and moments are equal bit for bit to those that DeepSpeed and torch put together. Steps and weight decays are
    right, and the bf16 weights are those that were trained. A checkpoint has 12 bytes per parameter. In the same form
    the next step has the same bits.
    """
    assert compared(tmp_path / "work", processes=2, engine="zero3", micro_batch=4) == (0, "done", "")


def test_rows_that_ranks_cannot_share_evenly_are_saved_once(tmp_path: Path) -> None:
    """FSDP2 and DDP on 4 ranks convert into each other, although a rank has no row of some weights."""
    assert compared(tmp_path / "work", processes=4, engine="fsdp2", micro_batch=2) == (0, "done", "")


def test_an_index_of_format_1_runs_no_code(tmp_path: Path) -> None:
    """DCP's index is a pickle, which could run code. Classes that it does not need are rejected."""
    (tmp_path / DCP_INDEX).write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"\.metadata cannot be read: .* more than tensors and plain values"):
        DcpFolder(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "converted"),
    [
        (identity("single", 1), identity("ddp", 4), False),
        (identity("zero3", 2), identity("zero3", 2), False),
        (identity("fsdp2", 2), identity("fsdp2", 2), False),
        (identity("fsdp2", 2), identity("fsdp2", 4), True),
        (identity("fsdp2", 2), identity("zero3", 2), True),
        (identity("fsdp2", 1), identity("single", 1), True),
        (identity("zero3", 2), identity("zero3", 4), True),
        (identity("zero3", 2), identity("zero2", 2), True),
        (identity("zero3", 1), identity("single", 1), True),
        (identity("zero3", 2), identity("zero3", 2, offload_optimizer=True), True),
    ],
    ids=lambda value: f"{value.engine} x {value.world_size}" if isinstance(value, Identity) else "",
)
def test_only_another_form_is_converted(one: Identity, other: Identity, converted: bool) -> None:
    """The same form resumes bit for bit, with its own settings of the optimizer."""
    assert (CheckpointForm.of(one) != CheckpointForm.of(other)) is converted


def test_states_of_another_layout_are_stored_whole() -> None:
    """Packed states, and those with fewer numbers than weights, cannot be split over ranks."""
    moment, packed, row = torch.zeros(2, 3), torch.zeros(6, dtype=torch.uint8), torch.zeros(2)
    assert split_state({"exp_avg": moment, "step": torch.tensor(3.0)}, 6) == ({"exp_avg": moment}, {})
    assert split_state({"state1": packed, "step": 3}, 6) == ({}, {"state1": packed})
    assert split_state({"exp_avg_sq_row": row}, 6) == ({}, {"exp_avg_sq_row": row})


def test_a_state_that_json_and_safetensors_cannot_hold_is_refused() -> None:
    """A checkpoint holds no pickle, so an optimizer with an object in its state cannot be saved."""
    with pytest.raises(UserError, match="the optimizer's state `history` is a list, which a checkpoint"):
        split_state({"history": [1, 2]}, 6)


def of_torch(scale: float) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=scale)))


def of_deepspeed(scale: float) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        scale, scale_window=3, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False
    )
    optimizer = SimpleNamespace(loss_scaler=scaler, dynamic_loss_scale=True)
    return SimpleNamespace(deepspeed=SimpleNamespace(optimizer=optimizer))


def with_loss_scale_of(saved: dict[str, Any], trainer: Any, engine: str) -> dict[str, Any] | None:
    """Return the state of a trainer's loss scaler after it got a saved one, through JSON."""
    state: Any = SimpleNamespace(scaler=json.loads(json.dumps(saved)))
    if engine == "single":
        load._set_torch_scaler(trainer.accelerator.scaler, state)
    else:
        load._set_deepspeed_scaler(trainer.deepspeed.optimizer.loss_scaler, state.scaler)
    return scaler_state(trainer, engine)


def test_a_loss_scale_goes_into_each_library() -> None:
    """In float16 the scale and its counters are restored. The other library continues with the scale alone."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux only")
    torchs, deepspeeds = of_torch(4096.0), of_deepspeed(64.0)
    torchs.accelerator.scaler.load_state_dict(
        {**torchs.accelerator.scaler.state_dict(), "_growth_tracker": 7}
    )
    scaler = deepspeeds.deepspeed.optimizer.loss_scaler
    scaler.cur_hysteresis, scaler.last_overflow_iter = 1, 2
    for _ in range(7):
        scaler.update_scale(overflow=False)
    ours, theirs = scaler_state(torchs, "single"), scaler_state(deepspeeds, "zero2")
    assert ours
    assert theirs
    assert (ours["scale"], theirs["cur_scale"], theirs["cur_iter"]) == (4096.0, 128.0, 7)
    assert with_loss_scale_of(ours, of_torch(1.0), "single") == ours
    assert with_loss_scale_of(theirs, of_deepspeed(1.0), "zero2") == theirs
    converted = with_loss_scale_of(theirs, of_torch(1.0), "single")
    assert converted
    assert (converted["scale"], converted["_growth_tracker"]) == (128.0, 0)
    converted = with_loss_scale_of(ours, of_deepspeed(1.0), "zero2")
    assert converted
    assert (converted["cur_scale"], converted["cur_iter"]) == (4096.0, 0)


def drawn(step: int, rank: int) -> tuple[float, ...]:
    reseed(42, step, rank)
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_random_numbers_are_of_the_step_and_the_rank() -> None:
    """No two ranks draw the same dropout, nor the run's first again; the same resume draws the same."""
    assert drawn(10, 0) == drawn(10, 0)
    assert len({drawn(10, 0), drawn(10, 1), drawn(20, 0), drawn(0, 0)}) == 4

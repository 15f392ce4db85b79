"""Where a parameter's numbers lie in what each rank wrote, in bf16 too, and what a rank draws after a change."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training import forks
from tests.training.ranks import finish, ranks_job
from tests.training.test_engines import needs_compiler
from trainer.job import Outcome
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.reshard.checkpoint_state import find_element_keys
from trainer.worker.reshard.deepspeed_checkpoint import Piece, pieces_of_stage_2, pieces_of_stage_3
from trainer.worker.reshard.fsdp_checkpoint import INDEX, DcpFolder
from trainer.worker.reshard.trainer_mixin import needs_conversion, reseed

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


def gathered(pieces: list[Piece], flats: list[torch.Tensor]) -> list[float]:
    numbers = [flats[piece.rank][piece.offset : piece.offset + piece.size] for piece in pieces]
    return [float(each) for each in torch.cat(numbers)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_pieces_of_stage_3_are_where_deepspeed_cuts(ranks: int) -> None:
    """Each parameter is padded to a multiple of the ranks and split, even one with fewer elements than ranks."""
    weights = [torch.arange(count, dtype=torch.float64) + 100 * number for number, count in enumerate(COUNTS)]
    padded = [torch.nn.functional.pad(weight, (0, -len(weight) % ranks), value=-1) for weight in weights]
    flats = [torch.cat([weight.chunk(ranks)[rank] for weight in padded]) for rank in range(ranks)]
    for weight, pieces in zip(weights, pieces_of_stage_3(COUNTS, ranks, 0), strict=True):
        assert gathered(pieces, flats) == weight.tolist()
        assert [piece.start for piece in pieces] == [*_starts(pieces)]


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
    found = pieces_of_stage_2(COUNTS, paddings, len(flats[0]), 0)
    for weight, pieces in zip(weights, found, strict=True):
        assert gathered(pieces, flats) == weight.tolist()
        assert [piece.start for piece in pieces] == [*_starts(pieces)]


def _starts(pieces: list[Piece]) -> list[int]:
    return [sum(each.size for each in pieces[:number]) for number in range(len(pieces))]


@needs_compiler
def test_float32_masters_of_bf16_weights_go_into_every_form(tmp_path: Path) -> None:
    """ZeRO-2 and ZeRO-3 on 2 ranks, with and without offload, convert into each other and into float32 weights.

    Masters and moments are equal bit for bit. Every tensor has its own step, every group its own weight decay, and the
    bf16 weights are those that were trained.
    """
    job = ranks_job(tmp_path / "work", "zephyr-tiny/sft", processes=2, engine="zero3", micro_batch=4)
    code = finish(forks.workers(job, "tests.training.half_ranks"))
    outcome = Outcome.model_validate_json(job.outcome.read_text())
    assert (code, outcome.status, outcome.message) == (0, "done", "")


def test_rows_of_float32_weights_go_where_they_lie(tmp_path: Path) -> None:
    """FSDP 2 on 4 ranks, with rows that they cannot share evenly and weights of which one has none: what is read, and what
    is filled into other parts, has the bits that torch puts together, and a step later too.
    """
    job = ranks_job(tmp_path / "work", "zephyr-tiny/sft", processes=4, engine="fsdp2", micro_batch=2)
    code = finish(forks.workers(job, "tests.training.cut_ranks"))
    outcome = Outcome.model_validate_json(job.outcome.read_text())
    assert (code, outcome.status, outcome.message) == (0, "done", "")


def test_an_index_runs_no_code(tmp_path: Path) -> None:
    """The index is a pickle, which could run code. Classes that it does not need are rejected."""
    (tmp_path / INDEX).write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match=r"a checkpoint's index must not contain builtins.print"):
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
    """On the same shape the engine loads its own files, bit for bit."""
    assert needs_conversion(one, other) is converted
    assert needs_conversion(other, one) is converted


def test_numbers_of_another_form_are_known() -> None:
    """Packed states, and those with fewer numbers than weights, cannot be cut."""
    moment, step = torch.zeros(2, 3), torch.tensor(3.0)
    assert find_element_keys([({"exp_avg": moment, "step": step}, 6), ({}, 9)]) == (("exp_avg",), None)
    assert find_element_keys([({"state1": torch.zeros(6, dtype=torch.uint8)}, 6)]) == ((), "state1")
    assert find_element_keys([({"exp_avg_sq_row": torch.zeros(2)}, 6)]) == ((), "exp_avg_sq_row")


def drawn(step: int, rank: int) -> tuple[float, ...]:
    reseed(42, step, rank)
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_random_numbers_are_of_the_step_and_the_rank() -> None:
    """No two ranks draw the same dropout, nor the run's first again; the same resume draws the same."""
    assert drawn(10, 0) == drawn(10, 0)
    assert len({drawn(10, 0), drawn(10, 1), drawn(20, 0), drawn(0, 0)}) == 4

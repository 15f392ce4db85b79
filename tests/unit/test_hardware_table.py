"""The table of GPUs, and looking up the board of a shape."""

from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.hardware import (
    Gpu,
    Shape,
    accelerator_name,
    board_name,
    detect,
    gpu,
    gpu_of,
    known_gpu,
    usable_gib,
)
from trainer.hardware.table import ALIASES, GPUS

NAMES = [
    ("NVIDIA A100-SXM4-40GB", 40.0, "A100"),
    ("NVIDIA A100-PCIE-40GB", 40.0, "A100-PCIE"),
    ("NVIDIA A100-SXM4-80GB", 80.0, "A100-80GB"),
    ("NVIDIA A100 80GB PCIe", 80.0, "A100-80GB-PCIE"),
    ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
    ("NVIDIA H100 PCIe", 79.6, "H100-PCIE"),
    ("NVIDIA H100 NVL", 93.6, "H100-NVL"),
    ("NVIDIA H200", 140.4, "H200"),
    ("NVIDIA GH200 480GB", 95.6, "GH200"),
    ("NVIDIA B200", 179.1, "B200"),
    ("NVIDIA L4", 22.5, "L4"),
    ("NVIDIA L40", 45.0, "L40"),
    ("NVIDIA L40S", 45.0, "L40S"),
    ("NVIDIA A10", 22.5, "A10"),
    ("NVIDIA A10G", 22.5, "A10G"),
    ("NVIDIA A40", 45.0, "A40"),
    ("NVIDIA RTX A6000", 48.0, "A6000"),
    ("Quadro RTX 6000", 24.0, "RTX6000"),
    ("NVIDIA RTX 6000 Ada Generation", 48.0, "RTX6000-Ada"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, "RTXPRO6000"),
    ("NVIDIA GeForce RTX 3090", 24.0, "RTX3090"),
    ("NVIDIA GeForce RTX 4090", 24.0, "RTX4090"),
    ("NVIDIA GeForce RTX 5090", 31.8, "RTX5090"),
    ("Tesla T4", 15.0, "T4"),
    ("Tesla P4", 7.5, "P4"),
    ("Tesla P100-PCIE-16GB", 16.0, "P100"),
    ("Tesla V100-SXM2-16GB", 16.0, "V100"),
    ("Tesla V100-SXM2-32GB", 32.0, "V100-32GB"),
]
"""Names and memory in `nvidia-smi`, and the board of the table."""


def shape(**given: object) -> Shape:
    some = {
        "accelerator": "A100",
        "count": 8,
        "memory_gib": 40.0,
        "cores": 96,
        "host_memory_gib": 680.0,
        "node": "n",
    }
    return Shape.model_validate({**some, **given})


@pytest.mark.parametrize("board", GPUS, ids=lambda board: board.name)
def test_every_row_is_plausible_and_has_sources(board: Gpu) -> None:
    """Every figure has a document, and the rates are in a possible order."""
    assert len(board.sources) >= 2
    assert all(source.startswith("https://") and " " not in source for source in board.sources)
    assert 0.96 < board.usable_gib / board.memory_gib < 1
    assert 0 < board.pcie_gbps < board.memory_gbps
    assert 0 < board.link_gbps < board.memory_gbps
    assert (board.bf16_tflops is not None) == (board.compute_capability >= (8, 0))
    assert board.bf16_tflops in (None, board.fp16_tflops)


def test_names_and_aliases_are_unique() -> None:
    """With a duplicate name the result would depend on the order of rows. Every alias leads to a board."""
    names = [board.name.casefold() for board in GPUS]
    assert len(set(names)) == len(names)
    assert {name.casefold() for name in ALIASES.values()} <= set(names)
    assert not {name.casefold() for name in ALIASES} & set(names)


@pytest.mark.parametrize(("name", "memory_gib", "board"), NAMES)
def test_the_driver_s_name_leads_to_the_board(name: str, memory_gib: float, board: str) -> None:
    """The figures of every machine are found by the name that its driver shows."""
    rented_as, own = accelerator_name(name, memory_gib), board_name(name, memory_gib)
    assert gpu(own or rented_as).name == board
    assert gpu(rented_as).memory_gib <= memory_gib + 0.1


@pytest.mark.parametrize(
    ("name", "expected"), [("a100-80gb", "A100-80GB"), ("RTXA6000", "A6000"), ("h100-sxm", "H100")]
)
def test_a_gpu_is_found_by_any_of_its_names(name: str, expected: str) -> None:
    """Case does not matter, and SkyPilot's catalogs have two names for some boards."""
    assert gpu(name).name == expected


@pytest.mark.parametrize(
    ("name", "near"),
    [("A100-80", "`A100-80GB`"), ("H1000", "`H100`"), ("RTX4080", "`RTX4090`"), ("?", "known: P4")],
)
def test_an_unknown_gpu_is_an_error_that_names_the_nearest(name: str, near: str) -> None:
    """A GPU that is not in the table has no figures."""
    assert known_gpu(name) is None
    with pytest.raises(UserError, match=f"no GPU `{name}`".replace("?", r"\?")) as caught:
        gpu(name)
    assert near in (caught.value.hint or "")


def test_a_pcie_board_is_not_mistaken_for_the_faster_one() -> None:
    """An H100 on a PCIe card has three quarters of the SXM board's peak, and no NVLink."""
    card = detect(run=lambda _: "0, GPU-0, NVIDIA H100 PCIe, 81559", read=lambda _: None, environ={})
    assert (str(card), card.board) == ("H100:1", "H100-PCIE")
    found = gpu_of(card)
    assert found is not None
    assert (found.bf16_tflops, found.link_gbps) == (756.5, found.pcie_gbps)


def test_usable_memory_follows_the_memory_that_the_driver_shows() -> None:
    """With error correction on, a board shows less memory than the table has, so less is usable."""
    full = shape(accelerator="A6000", memory_gib=gpu("A6000").memory_gib)
    corrected = shape(accelerator="A6000", memory_gib=46068 / 1024)
    assert usable_gib(full) == pytest.approx(gpu("A6000").usable_gib)
    assert usable_gib(corrected) == pytest.approx(44.31, abs=0.01)


def test_a_gpu_outside_the_table_has_memory_but_no_peak() -> None:
    """A local machine with a GPU outside the table still gets a fit."""
    other = shape(accelerator="GTX1080", memory_gib=8.0)
    assert gpu_of(other) is None
    assert usable_gib(other) == pytest.approx(7.6)


def test_a_cpu_has_no_board_and_no_gpu_memory() -> None:
    """A shape without a GPU gives None for both."""
    cpu = shape(accelerator=None, count=0, memory_gib=None)
    assert (gpu_of(cpu), usable_gib(cpu), cpu.gpus) == (None, None, 0)


def test_several_nodes_are_counted_and_shown() -> None:
    """`count` is per node, and `gpus` is the total."""
    assert (str(shape(nodes=2)), shape(nodes=2).gpus) == ("2 x A100:8", 16)
    assert str(shape()) == "A100:8"

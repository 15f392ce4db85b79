"""What is predicted of published runs stays as near to them as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = str(Path(__file__).resolve().parents[2] / "bench")
sys.path.insert(0, BENCH)
from estimate import predict  # noqa: E402
from published import RUNS, Published  # noqa: E402

sys.path.remove(BENCH)
TARGET = 0.15
MISSED = {
    "torchtune 8B LoRA, RTX 4090": 0.25,
    "zephyr-7b-beta (DPO), 2 x 8 x A100-80GB": 0.30,
    "zephyr-7b-beta: an evaluation": 0.35,
    "notus-7b-v1-lora: an evaluation": 0.25,
}
"""Those that do not reach it, and how far off they are; why is in `bench/estimate.md`."""


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_a_published_run_is_predicted_within_what_the_table_says(run: Published) -> None:
    """A change of a factor that moves a published run out of its bounds is seen here first."""
    value, _ = predict(run)
    assert abs(value / run.value - 1) <= MISSED.get(run.name, TARGET)

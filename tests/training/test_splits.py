"""DPO on as many processes as SFT is shown on: pairs, and the answers' tokens, weigh the same wherever they are dealt to."""

from __future__ import annotations

from pathlib import Path

from tests.training.jobs import train
from tests.training.ranks import ranks_job, run
from tests.training.test_engines import DPO, assert_alike


def test_four_processes_change_no_trajectory_of_pairs(tmp_path: Path) -> None:
    """4 x 1 x 2 takes the steps of 1 x 8 x 1: `sigmoid` is a mean over pairs, `sft` one over the answers' tokens."""
    whole = train(ranks_job(tmp_path / "one", DPO, micro_batch=8))
    assert_alike(whole, run(ranks_job(tmp_path / "four", DPO, processes=4, micro_batch=1)))

"""bitsandbytes' optimizers under another engine: 32-bit states are converted, 8-bit states are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.jobs import train
from tests.training.ranks import ranks_job
from tests.training.test_engines import SFT, needs_compiler
from tests.training.test_reshard import LORA, assert_goes_on, trained
from trainer.errors import UserError
from trainer.worker.reshard.checkpoint_state import load_mapped
from trainer.worker.reshard.replica_checkpoint import ReplicaState

pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")
PAGED = (*LORA, "optim=paged_adamw_32bit")


@needs_compiler
def test_a_paged_optimizer_goes_on_under_zero_3_and_back(tmp_path: Path) -> None:
    """Bitsandbytes nests its moments a level deeper than torch. They are split and joined like torch's."""
    before = trained(tmp_path / "before", "single", *PAGED)
    sharded = trained(tmp_path / "sharded", "zero3", *PAGED, resume_from=before.checkpoint(10))
    assert_goes_on(before, sharded)
    back = trained(tmp_path / "back", "single", *PAGED, resume_from=sharded.checkpoint(15))
    assert_goes_on(before, back, 15)


def test_eight_bits_are_refused(tmp_path: Path) -> None:
    """8-bit states have a scale per block of weights, and other shards have other blocks, so a resume is refused."""
    done = train(ranks_job(tmp_path / "work", SFT, "optim=adamw_bnb_8bit", "max_steps=1", "save_steps=1"))
    folder = done.checkpoint(1)
    states = load_mapped(folder / "optimizer.pt")["state"]
    order = [[str(number)] for number in range(len(states))]
    with pytest.raises(UserError, match="is not one value per weight"):
        ReplicaState(folder, order)
    assert torch.uint8 in {
        each.dtype for state in states.values() for hidden in state.values() if isinstance(hidden, dict)
        for each in hidden.values()
    }  # fmt: skip

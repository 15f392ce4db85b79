"""bitsandbytes' optimizers under another engine: 32-bit states are converted, 8-bit states resume in their own form only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import rank_files
from tests.training.ranks import ranks_job, run
from tests.training.test_engines import ENGINES, SFT, kinds, needs_compiler
from tests.training.test_reshard import LORA, assert_goes_on, trained

pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")
PAGED = (*LORA, "optim=paged_adamw_32bit")
EIGHT_BITS = ("optim=adamw_bnb_8bit", "tiny.intermediate_size=256", "max_steps=6", "save_steps=3")
"""States of weights with fewer than 4096 elements, and of embeddings, have 32 bits."""


@needs_compiler
def test_a_paged_optimizer_goes_on_under_zero_3_and_back(tmp_path: Path) -> None:
    """The moments of bitsandbytes have other names than torch's. They are split and joined like torch's."""
    before = trained(tmp_path / "before", "single", *PAGED)
    sharded = trained(tmp_path / "sharded", "zero3", *PAGED, resume_from=before.checkpoint(10))
    assert_goes_on(before, sharded)
    back = trained(tmp_path / "back", "single", *PAGED, resume_from=sharded.checkpoint(15))
    assert_goes_on(before, back, 15)


@pytest.mark.parametrize("kind", kinds("ddp", "zero2", thorough=("zero2",)))
def test_eight_bits_resume_exactly_in_their_own_form(tmp_path: Path, kind: str) -> None:
    """8-bit states are stored as they are, with their scales. The same form resumes with the same bits.

    They have a scale per block of weights, and other shards have other blocks, so another form is refused.
    """
    whole = run(ranks_job(tmp_path / "whole", SFT, *EIGHT_BITS, **ENGINES[kind]))
    saved = whole.checkpoint(3)
    for tensors in rank_files.read(saved).values():
        packed = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
        assert {name for name in packed if name.startswith("own/") and name.endswith("/state1")}
    again = run(ranks_job(tmp_path / "again", SFT, *EIGHT_BITS, resume_from=saved, **ENGINES[kind]))
    assert again.trajectory == whole.trajectory[3:]
    ours, theirs = (load_file(each.final / "model.safetensors") for each in (again, whole))
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())
    refused = run(ranks_job(tmp_path / "refused", SFT, *EIGHT_BITS, resume_from=saved, **ENGINES["fsdp2"]))
    assert refused.outcome.status == "user_error"
    assert "is not one value per weight" in refused.outcome.message


def test_adafactor_resumes_exactly_in_its_own_form(tmp_path: Path) -> None:
    """Adafactor's states are per row and column. They are stored as they are, each by one of the replicas."""
    words = (SFT, "optim=adafactor", "max_steps=6", "save_steps=3")
    whole = run(ranks_job(tmp_path / "whole", *words, **ENGINES["ddp"]))
    rows = [
        {name for name in tensors if name.endswith("/exp_avg_sq_row")}
        for tensors in rank_files.read(whole.checkpoint(3)).values()
    ]
    assert all(rows)
    assert not rows[0] & rows[1]
    again = run(ranks_job(tmp_path / "again", *words, resume_from=whole.checkpoint(3), **ENGINES["ddp"]))
    assert again.trajectory == whole.trajectory[3:]

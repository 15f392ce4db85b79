"""The checkpoint of every engine has the same kind of files, which hold everything once and are joined without an engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.training import rank_files
from tests.training.ranks import ranks_job, run
from tests.training.test_engines import DPO, ENGINES, SFT, Engine, engine, final, kinds
from trainer.worker.checkpoint.format import INDEX_FILE, Index
from trainer.worker.publish_model import consolidate

__all__ = ["engine"]

PICKLES, ZIP = {bytes([0x80, protocol]) for protocol in range(2, 6)}, b"PK\x03\x04"
"""First bytes: https://docs.python.org/3/library/pickletools.html, https://docs.python.org/3/library/zipfile.html"""


@pytest.mark.parametrize("kind", kinds("ddp", "zero2", "zero3", "fsdp2"))
def test_a_checkpoint_of_parts_is_put_together(tmp_path: Path, engine: Engine, kind: str) -> None:
    """From the ranks' parts alone, the tensors of `final/`."""
    trained = engine(kind, DPO)
    consolidate(trained.checkpoint(6), tmp_path / "out")
    mine, theirs = load_file(tmp_path / "out" / "model.safetensors"), final(trained)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in trained.final.iterdir()
    }


@pytest.mark.parametrize("kind", kinds(*ENGINES))
def test_a_checkpoint_has_twelve_bytes_per_parameter(engine: Engine, kind: str) -> None:
    """Float32 values and AdamW's two moments are stored once: no padding, and nothing that can be derived."""
    trained = engine(kind, DPO)
    sizes = rank_files.trained_bytes(trained.checkpoint(3))
    assert len(sizes) == 2
    assert sum(sizes.values()) == 12 * trained.of("started")[0]["parameters"]


@pytest.mark.parametrize("kind", kinds(*ENGINES))
def test_an_index_has_every_element_once(engine: Engine, kind: str) -> None:
    """The slices of a parameter follow one another from its first to its last element."""
    index = Index.model_validate_json((engine(kind, DPO).checkpoint(3) / INDEX_FILE).read_text())
    assert index.replicated == (kind == "ddp")
    for parameter in index.parameters.values():
        at = 0
        for each in sorted(parameter.slices, key=lambda each: each.start):
            assert each.start == at
            at += each.size
        assert at == math.prod(parameter.shape)


def test_each_of_ddps_ranks_writes_a_share(engine: Engine) -> None:
    """Each of two replicas writes other parameters, and about half of the bytes."""
    folder = engine("ddp", DPO).checkpoint(3)
    first, second = rank_files.trained_bytes(folder).values()
    assert first == pytest.approx(second, rel=0.1)
    index = Index.model_validate_json((folder / INDEX_FILE).read_text())
    assert {len(parameter.slices) for parameter in index.parameters.values()} == {1}


@pytest.mark.parametrize("kind", kinds(*ENGINES))
def test_no_file_of_a_checkpoint_can_run_code(engine: Engine, kind: str) -> None:
    """Every file is JSON, text or safetensors by its content: no pickle, and no zip, in which torch writes pickles."""
    for path in engine(kind, DPO).checkpoint(3).rglob("*"):
        data = path.read_bytes()
        assert data[:2] not in PICKLES
        assert data[:4] != ZIP
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                assert file.keys()
        elif path.suffix == ".json":
            json.loads(data)
        else:
            assert path.suffix == ".jinja"


@pytest.mark.parametrize("kind", kinds("zero3", "fsdp2"))
def test_an_adapter_of_a_cut_model_is_put_together(tmp_path: Path, kind: str) -> None:
    """Without the base, under the names that PEFT reads; after an evaluation."""
    from peft import load_peft_weights

    lora = (
        "use_peft=true",
        "lora_r=4",
        "lora_target_modules=[q_proj, v_proj]",
        "max_steps=1",
        "save_steps=1",
        "eval_strategy=steps",
        "eval_steps=1",
    )
    trained = run(ranks_job(tmp_path / "work", SFT, *lora, **ENGINES[kind]))
    assert 0 < trained.of("eval")[0]["eval_loss"] < 10
    consolidate(trained.checkpoint(1), tmp_path / "out")
    mine = load_peft_weights(str(tmp_path / "out"), device="cpu")
    theirs = load_file(trained.job.work / "adapter" / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

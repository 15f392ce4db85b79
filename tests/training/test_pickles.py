"""A checkpoint of format 1 has pickles, which could run code: none of it runs, whatever reads the checkpoint.

Each pickle of `tests/fixtures/bucket_v1` is changed so that a program that trusts it runs code and then gets the same
content. Sizes and checksums in the manifest are those of the changed files, as if an attacker could write to the bucket.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.fixtures.make_bucket import INPUTS, ROOT, RUNS, STEPS, train
from trainer.bucket.byte_streams import checksum_file
from trainer.errors import UserError
from trainer.worker.checkpoint.format_1 import Order, open_format_1, required_files
from trainer.worker.checkpoint.identity import Identity

BUCKET = ROOT / "tests" / "fixtures" / "bucket_v1"
OLDER, NEWEST = STEPS
REFUSAL = "it is damaged, or has more than tensors and plain values"
POP = b"0"
"""https://docs.python.org/3/library/pickletools.html"""
UNREAD = "training_args.bin"
"""Transformers wrote it, and nothing reads it."""


class Attack:
    """A pickle of it runs code when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self._marker)!r}, 'w').close()",)


def poison(data: bytes, marker: Path) -> bytes:
    """Return a pickle, or an archive of `torch.save`, that runs code and then gives what it gave before."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        code = pickle.dumps(Attack(marker), 2).removesuffix(pickle.STOP)
        return code + POP + data
    into = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(into, "w") as new:
        for entry in old.infolist():
            with old.open(entry) as file:
                file._expected_crc = None  # release 0.1 wrote no checksums into its archives
                content = file.read()
            new.writestr(entry, poison(content, marker) if entry.filename.endswith("/data.pkl") else content)
    return into.getvalue()


def values_in(index: Any, file: Path) -> list[Any]:
    """Return where in a rank's file of DCP the values are that are no tensors."""
    values = {name for name, each in index.state_dict_metadata.items() if not hasattr(each, "chunks")}
    found = index.storage_data.items()
    return [info for at, info in found if at.fqn in values and info.relative_path == file.name]


def poison_file(file: Path, marker: Path) -> None:
    """Poison a file. Of a rank's file of DCP, poison a value in it, to which the index then refers."""
    if file.suffix != ".distcp":
        file.write_bytes(poison(file.read_bytes(), marker))
        return
    index_file = file.parent / ".metadata"
    index = pickle.loads(index_file.read_bytes())
    info = values_in(index, file)[0]
    data = file.read_bytes()
    value = poison(data[info.offset : info.offset + info.length], marker)
    file.write_bytes(data + value)
    info.offset, info.length = len(data), len(value)
    index_file.write_bytes(pickle.dumps(index))


def folder_of(bucket: Path, run: str, step: int = OLDER) -> Path:
    """Return the folder of a checkpoint."""
    [folder] = bucket.glob(f"{run}/checkpoints/step-{step:08d}/*")
    return folder


def is_pickle(file: Path) -> bool:
    if file.suffix == ".distcp":
        return bool(values_in(pickle.loads((file.parent / ".metadata").read_bytes()), file))
    return file.suffix in (".pt", ".pth", ".bin") or file.name == ".metadata"


def pickles() -> list[tuple[str, str]]:
    """Return each run with the path of each pickle in its older checkpoint."""
    return [
        (run, str(file.relative_to(folder)))
        for run in RUNS
        for folder in [folder_of(BUCKET, run)]
        for file in sorted(folder.rglob("*"))
        if is_pickle(file)
    ]


def read(folder: Path) -> None:
    """Read everything that a run can need of a checkpoint, under any engine."""
    origin = Identity.model_validate_json((folder / "aeolus.json").read_text())
    required_files(folder, origin.engine, origin.world_size)
    saved = open_format_1(folder, origin.engine, origin.world_size, order_of(folder))
    for parameter in saved.parameters.values():
        for key in parameter.pieces:
            values = torch.zeros(parameter.count, dtype=parameter.stored_dtype(key))
            parameter.copy(key, 0, values)
    for rank in range(origin.world_size):
        saved.random(rank)


def order_of(folder: Path) -> Order | None:
    """Return the parameters of a checkpoint of one process; None for others, which name them themselves."""
    files = list(folder.glob("*model.safetensors"))
    return [[name] for file in files for name in safe_open(file, framework="pt").keys()] or None  # noqa: SIM118


def test_every_kind_of_file_is_attacked() -> None:
    """The files of all engines are in the list."""
    names = {Path(name).name for _, name in pickles()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", ".metadata", UNREAD} <= names
    assert {"__1_0.distcp", "mp_rank_00_model_states.pt"} <= names
    assert sum(name.endswith("optim_states.pt") for name in names) == 2


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_an_attack_would_succeed(tmp_path: Path, name: str) -> None:
    """A program that trusts the file runs the code, and gets the same content as before."""
    file, marker = tmp_path / name, tmp_path / "marker"
    shutil.copy(folder_of(BUCKET, "sft_full") / name, file)
    before = torch.load(file, weights_only=False)
    poison_file(file, marker)
    assert torch.load(file, weights_only=False).keys() == before.keys()
    assert marker.exists()


@pytest.mark.parametrize(("run", "name"), [pytest.param(*each, id="-".join(each)) for each in pickles()])
def test_no_reader_runs_the_code(tmp_path: Path, run: str, name: str) -> None:
    """The file is refused by one message that names it. A file that nothing needs is not opened."""
    folder, marker = shutil.copytree(folder_of(BUCKET, run), tmp_path / "checkpoint-3"), tmp_path / "marker"
    read(folder)
    poison_file(folder / name, marker)
    if name == UNREAD:
        read(folder)
    else:
        with pytest.raises(UserError, match=REFUSAL) as refused:
            read(folder)
        assert Path(name).name in refused.value.message
        assert "weights_only" not in refused.value.message, "torch advises to run the code"
    assert not marker.exists()


def test_a_poisoned_loss_scaler_runs_no_code(tmp_path: Path) -> None:
    """A run in float16 has one more file."""
    folder, marker = (
        shutil.copytree(folder_of(BUCKET, "sft_full"), tmp_path / "checkpoint-3"),
        tmp_path / "marker",
    )
    torch.save({"scale": 65536.0, "_growth_tracker": 3}, folder / "scaler.pt")
    read(folder)
    poison_file(folder / "scaler.pt", marker)
    with pytest.raises(UserError, match=REFUSAL):
        read(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "inner/outside"])
def test_an_index_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    """A changed index of DCP cannot make the reader open other files of the machine."""
    folder = shutil.copytree(folder_of(BUCKET, "sft_fsdp2"), tmp_path / "checkpoint-3")
    index = pickle.loads((folder / "optimizer_0" / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=rf"\.metadata cannot be read: {name} is not in this folder"):
        read(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", pickle.dumps({}), pickle.dumps(3)], ids=["empty", "cut", "dict", "3"]
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    """A damaged index of DCP is one clear error too."""
    folder = shutil.copytree(folder_of(BUCKET, "sft_fsdp2"), tmp_path / "checkpoint-3")
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata cannot be read"):
        read(folder)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return shutil.copytree(BUCKET, tmp_path / "bucket")


def attack(bucket: Path, run: str, step: int, name: str) -> Path:
    """Poison one file of a checkpoint in a bucket, so that its manifest verifies; return what the code would create."""
    marker = bucket.parent / "marker"
    folder = folder_of(bucket, run, step)
    poison_file(folder / name, marker)
    commit = bucket / run / "commits" / f"step-{step:08d}.json"
    manifest = json.loads(commit.read_text())
    for file in manifest["files"]:
        file["size"], file["xxh3"] = checksum_file(folder / file["path"])
    commit.write_text(json.dumps(manifest))
    return marker


def cut(bucket: Path, run: str) -> None:
    """Make a run end with its older checkpoint."""
    for name in ("final", f"step-{NEWEST:08d}"):
        (bucket / run / "commits" / f"{name}.json").unlink()


def called(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def assert_refused(output: str, marker: Path, name: str) -> None:
    assert f"{Path(name).name} cannot be read: {REFUSAL}" in output
    assert "Traceback" not in output
    assert not marker.exists()


@pytest.mark.parametrize(
    ("run", "name", "overrides"),
    [
        ("sft_full", "optimizer.pt", ()),
        pytest.param("sft_full", "rng_state.pth", (), marks=pytest.mark.thorough),
        pytest.param("sft_full", "scheduler.pt", (), marks=pytest.mark.thorough),
        ("sft_fsdp2", "optimizer_0/.metadata", ("engine=ddp",)),
        pytest.param("sft_fsdp2", "optimizer_0/__1_0.distcp", ("engine=ddp",), marks=pytest.mark.thorough),
        pytest.param(
            "dpo_zero2", "global_step3/mp_rank_00_model_states.pt", ("engine=ddp",), marks=pytest.mark.thorough
        ),
    ],
)  # fmt: skip
def test_a_resume_runs_no_code(bucket: Path, run: str, name: str, overrides: tuple[str, ...]) -> None:
    """One process resumes: from a checkpoint of its own kind, or of another engine's, which is converted."""
    cut(bucket, run)
    marker = attack(bucket, run, OLDER, name)
    work = ("--checkpoints", str(bucket), "--run-id", run, "--work", str(bucket.parent / "work"))
    done = called("trainer", "run", str(INPUTS / f"{run}.yaml"), *overrides, *work)
    assert done.returncode == 78, done.stderr
    assert_refused(done.stderr, marker, name)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("run", "name"), [("sft_fsdp2", "pytorch_model_fsdp_0/.metadata"), ("sft_fsdp2", "rng_state_1.pth")]
)
def test_a_resume_of_two_ranks_runs_no_code(bucket: Path, run: str, name: str) -> None:
    """Two ranks resume under the same engine. The second one alone reads its random numbers."""
    cut(bucket, run)
    marker = attack(bucket, run, OLDER, name)
    output = train(ROOT, sys.executable, INPUTS / f"{run}.yaml", bucket, bucket.parent / "work")
    assert_refused(output, marker, name)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("sft_fsdp2", "pytorch_model_fsdp_0/.metadata"),
        pytest.param("dpo_zero2", "global_step6/mp_rank_00_model_states.pt", marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_an_export_runs_no_code(bucket: Path, tmp_path: Path, run: str, name: str) -> None:
    """The checkpoints of sharded engines have their weights in pickles."""
    marker = attack(bucket, run, NEWEST, name)
    words = ("--step", str(NEWEST), "--into", str(tmp_path / "model"))
    done = called("trainer", "export", str(bucket / run), *words)
    assert done.returncode == 78, done.stderr
    assert_refused(done.stderr, marker, name)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", [pytest.param("optimizer.pt", marks=pytest.mark.thorough), UNREAD])
def test_a_merge_runs_no_code(bucket: Path, tmp_path: Path, name: str) -> None:
    """An adapter is in safetensors. The pickles beside it are neither read nor exported."""
    marker = attack(bucket, "dpo_lora", NEWEST, name)
    record = bucket / "dpo_lora" / "run.json"
    said = json.loads(record.read_text())
    said["recipe"]["model_name_or_path"] = str(INPUTS / "model")
    record.write_text(json.dumps(said))
    words = ("--step", str(NEWEST), "--merge", "--into", str(tmp_path / "merged"))
    done = called("trainer", "export", str(bucket / "dpo_lora"), *words)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    assert not [path for path in (tmp_path / "merged").iterdir() if is_pickle(path)]

"""The files of a checkpoint of format 2: damage of any kind is one error that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fixtures.make_bucket import ROOT
from trainer.errors import UserError
from trainer.worker.checkpoint.format import is_format_2, open_format_2

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
SPLIT = "model.layers.0.mlp.up_proj.weight"
"""A weight of which each rank has a half."""
State = dict[tuple[str, str], torch.Tensor]
Json = Any


def saved() -> Path:
    """A checkpoint that two ranks of FSDP2 wrote."""
    [folder] = ROOT.glob("tests/fixtures/bucket_v2/sft_fsdp2/checkpoints/step-00000003/*")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(saved(), tmp_path / "checkpoint-3")


def read(folder: Path, ranks: int = 2) -> State:
    """Return everything of a checkpoint that is in the files of its ranks."""
    state = open_format_2(folder)
    found: State = {}
    for name, parameter in state.parameters.items():
        for key in parameter.pieces:
            values = torch.zeros(parameter.count, dtype=parameter.stored_dtype(key))
            parameter.copy(key, 0, values)
            found[name, key] = values
    return found | {
        (f"rank {rank}", key): value for rank in range(ranks) for key, value in state.random(rank).items()
    }


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the index in place."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_a_checkpoint_is_read_as_it_was_written(folder: Path) -> None:
    """Every weight and moment is in the index, and they are what the ranks' files have."""
    state = read(folder)
    kinds = {key for name, key in state if not name.startswith("rank")}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq"}
    halves = [load_file(folder / file)[f"exp_avg/{SPLIT}"] for file in (FIRST, SECOND)]
    assert torch.equal(state[SPLIT, "exp_avg"], torch.cat(halves))


@pytest.mark.parametrize("name", ["index.json", "scalars.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"format": 2', b"not JSON", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "brace", "cut", "text", "list", "null", "no fields", "no UTF-8", "deep"],
)
def test_json_that_is_damaged_is_named(folder: Path, name: str, content: bytes) -> None:
    """The message names the file and the way out. No content of the file crashes the reader."""
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint-3/{name} cannot be read") as refused:
        open_format_2(folder)
    assert "resumes from the previous checkpoint" in str(refused.value.hint)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("name", ["index.json", "scalars.json"])
def test_json_that_is_cut_anywhere_is_named(folder: Path, name: str) -> None:
    """Every proper beginning of the file is refused."""
    whole = (folder / name).read_bytes()
    for size in range(0, len(whole), 97):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"checkpoint-3/{name} cannot be read"):
            open_format_2(folder)


@pytest.mark.parametrize("name", ["index.json", "scalars.json", FIRST, SECOND])
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    """A checkpoint without its index is not taken for one of format 1."""
    (folder / name).unlink()
    assert is_format_2(folder)
    with pytest.raises(UserError, match=f"checkpoint-3/{name} cannot be read: it is missing"):
        open_format_2(folder)


def parameter(index: Json) -> Json:
    return index["parameters"][SPLIT]


def move(index: Json, *, by: int) -> None:
    parameter(index)["slices"][1]["start"] += by


def resize(index: Json, *, by: int) -> None:
    parameter(index)["slices"][1]["size"] += by


def put(index: Json, field: str, value: Json) -> None:
    parameter(index)[field] = value


def put_file(index: Json, value: Json) -> None:
    parameter(index)["slices"][0]["file"] = value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index.update(format=3), "format: "),
        (lambda index: index.update(more=1), "more: Extra inputs"),
        (partial(move, by=-1), "slices overlap or leave a gap at element 255"),
        (partial(move, by=1), "slices overlap or leave a gap at element 256"),
        (partial(move, by=-1000), "start: Input should be greater than or equal to 0"),
        (partial(resize, by=1), "the slices have 513 elements, and the shape 512"),
        (partial(resize, by=-1), "the slices have 511 elements, and the shape 512"),
        (partial(resize, by=-1000), "size: Input should be greater than or equal to 0"),
        (partial(put, field="shape", value=[32, 17]), "the slices have 512 elements, and the shape 544"),
        (partial(put, field="shape", value=[-32, -16]), "shape"),
        (partial(put, field="slices", value=[]), "the slices have 0 elements, and the shape 512"),
        (partial(put, field="dtype", value="load"), "dtype: Value error, load is not a known dtype"),
        (partial(put, field="keys", value={"exp_avg": "float32"}), "it has no weights"),
        (partial(put, field="keys", value={"weights": "system"}), "system is not a known dtype"),
        (partial(put_file, value="rank-00009.safetensors"), "it is missing"),
        (partial(put_file, value=SECOND), "two slices are in one file"),
        (partial(put_file, value="../index.json"), "file: String should match pattern"),
        (partial(put_file, value="/etc/passwd"), "file: String should match pattern"),
        (partial(put_file, value=f"../checkpoint-3/{FIRST}"), "file: String should match pattern"),
        (partial(put_file, value=f"{FIRST}\n"), "file: String should match pattern"),
        (partial(put_file, value=""), "file: String should match pattern"),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong_in_itself_is_refused(
    folder: Path, change: Callable[[Json], object], reason: str
) -> None:
    """Slices make up each parameter, dtypes are known, and files are in the folder. No file outside of it is opened."""
    edit(folder, change)
    with pytest.raises(UserError, match="cannot be read") as refused:
        open_format_2(folder)
    assert reason in refused.value.message


def rename(index: Json) -> None:
    index["parameters"]["another"] = index["parameters"].pop(SPLIT)


@pytest.mark.parametrize(
    "change",
    [
        rename,
        lambda index: index["parameters"].pop(SPLIT),
        lambda index: parameter(index)["keys"].pop("exp_avg"),
        lambda index: parameter(index)["keys"].update(exp_avg="float16"),
        lambda index: parameter(index)["keys"].update(momentum="float32"),
    ],
    ids=["another name", "no parameter", "no moment", "another dtype", "another moment"],
)
def test_an_index_that_its_files_contradict_is_refused(
    folder: Path, change: Callable[[Json], object]
) -> None:
    """Each file has exactly the tensors that the index names, in their dtypes and sizes."""
    edit(folder, change)
    with pytest.raises(
        UserError, match=rf"checkpoint-3/{FIRST} cannot be read: .* is not as index.json has it"
    ):
        read(folder)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (f"weights/{SPLIT}", torch.zeros(256, dtype=torch.float16), "is not as index.json has it"),
        (f"weights/{SPLIT}", torch.zeros(255), "is not as index.json has it"),
        (f"weights/{SPLIT}", torch.zeros(16, 16), "is not as index.json has it"),
        (f"weights/{SPLIT}", None, "is not as index.json has it"),
        ("weights/another", torch.zeros(2), "is not as index.json has it"),
        ("random/numpy", None, "it has no random numbers of numpy"),
        ("random/python", torch.zeros(3, dtype=torch.int64), "it has no random numbers of python"),
        ("random/cpu", torch.zeros(5056), "it has no random numbers of cpu"),
    ],
)
def test_tensors_that_differ_from_the_index_are_refused(
    folder: Path, name: str, value: torch.Tensor | None, reason: str
) -> None:
    """Another dtype would be converted, and a shorter tensor would leave old values, both without a word."""
    tensors: dict[str, torch.Tensor] = load_file(folder / SECOND)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / SECOND)
    with pytest.raises(UserError, match=f"checkpoint-3/{SECOND} cannot be read") as refused:
        read(folder)
    assert reason in refused.value.message


@pytest.mark.parametrize("keep", [0, 7, 8, 300, 20_000])
def test_a_file_of_a_rank_that_is_cut_is_refused(folder: Path, keep: int) -> None:
    """It ends in its header's length, in its header, or in its tensors."""
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:keep])
    with pytest.raises(UserError, match=f"checkpoint-3/{SECOND} cannot be read"):
        read(folder)


@cache
def index() -> str:
    return (saved() / "index.json").read_text()


@cache
def whole() -> State:
    return read(saved())


def places(node: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in the index."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def at(node: Json, path: tuple[Any, ...]) -> Json:
    for key in path:
        node = node[key]
    return node


PLACES = st.sampled_from(list(places(json.loads(index()))))
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    place=PLACES, other=st.one_of(ANY, PLACES.map(lambda path: at(json.loads(index()), path)), st.just(...))
)
def test_no_change_of_the_index_is_read_as_another_state(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], other: Json
) -> None:
    """A value of the index is deleted or replaced, by anything or by another value of the index. Then the checkpoint is
    refused, or is read with the same values. A shape with as many elements is no other state of the optimizer.
    """
    folder = tmp_path_factory.mktemp("changed") / "checkpoint-3"
    folder.mkdir()
    for path in saved().iterdir():
        (folder / path.name).symlink_to(path)
    changed = json.loads(index())
    *above, last = place
    if other is ...:
        del at(changed, tuple(above))[last]
    else:
        at(changed, tuple(above))[last] = other
    (folder / "index.json").unlink()
    (folder / "index.json").write_text(json.dumps(changed))
    try:
        state = read(folder)
    except UserError:
        return
    assert state.keys() == whole().keys()
    assert all(torch.equal(state[name], whole()[name]) for name in state)

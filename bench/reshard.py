"""Measure the cost of loading a checkpoint of two ranks on another number of ranks: `.venv-trainer/bin/python bench/reshard.py`.

The checkpoint has the slices of ZeRO-3 on 2 ranks, of a model with Mistral's layers made narrower. Each case is a process
of its own that fills an engine's tensors from the files: time, and the most memory that it had beyond those tensors.
Files are read from the page cache, where a checkpoint lies that was just restored.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer.worker.checkpoint.format import (
    INDEX_FILE,
    SCALARS_FILE,
    Index,
    IndexedParameter,
    Scalars,
    Slice,
    TensorScalar,
    open_format_2,
    rank_file,
    tensor_name,
)
from trainer.worker.checkpoint.format_1 import pieces_of_stage_3
from trainer.worker.checkpoint.load import Filler
from trainer.worker.checkpoint.optimizer_layout import Group, OptimizerTensor, ParameterSlice, Target
from trainer.worker.checkpoint.state import WEIGHTS, SavedState

RANKS = 2
KEYS = (WEIGHTS, "exp_avg", "exp_avg_sq")
BYTES = 12  # to a parameter: float32 master and AdamW's two moments
MISTRAL_7B = 7_241_732_096
"""Parameters, of https://huggingface.co/mistralai/Mistral-7B-v0.1."""
SUB_GROUP = 20_000_000


def shapes(width: int, layers: int) -> dict[str, torch.Size]:
    """Return Mistral's parameter names and shapes, with `width` as the hidden size."""
    inner, vocabulary, keys = width * 7 // 2, 32_000, width // 4
    found = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        own = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    found["lm_head.weight"] = (vocabulary, width)
    return {name: torch.Size(shape) for name, shape in found.items()}


def sub_groups(named: dict[str, torch.Size]) -> list[dict[str, torch.Size]]:
    """Return the sub-groups as DeepSpeed fills them, up to `SUB_GROUP` elements per rank."""
    groups: list[dict[str, torch.Size]] = [{}]
    for name, shape in named.items():
        if sum(each.numel() for each in groups[-1].values()) >= SUB_GROUP * RANKS:
            groups.append({})
        groups[-1][name] = shape
    return groups


def write(folder: Path, named: dict[str, torch.Size]) -> int:
    """Write a checkpoint and return its bytes."""
    counts = [shape.numel() for shape in named.values()]
    files: list[dict[str, Any]] = [{} for _ in range(RANKS)]
    parameters = {}
    for (name, shape), places in zip(named.items(), pieces_of_stage_3(counts, RANKS), strict=True):
        for rank, _, _, size in places:
            files[rank] |= {tensor_name(key, name): torch.rand(size) for key in KEYS}
        slices = tuple(Slice(file=rank_file(rank), start=start, size=size) for rank, _, start, size in places)
        parameters[name] = IndexedParameter(
            shape=tuple(shape), dtype=None, keys=dict.fromkeys(KEYS, "float32"), slices=slices
        )
    for rank, tensors in enumerate(files):
        save_file(tensors, folder / rank_file(rank))
    scalars = Scalars(
        groups=({"lr": 1e-5},),
        schedule={},
        scaler=None,
        states={name: {"step": TensorScalar(dtype="float32", value=1.0)} for name in named},
        own_keys=(),
    )
    (folder / INDEX_FILE).write_text(Index(replicated=False, parameters=parameters).model_dump_json())
    (folder / SCALARS_FILE).write_text(scalars.model_dump_json())
    return sum(path.stat().st_size for path in folder.iterdir())


def engine(groups: list[dict[str, torch.Size]], rank: int, ranks: int) -> Target:
    """Return what `rank` of `ranks` steps under ZeRO-3, or what a single process steps if there is one rank."""
    stepped = []
    for group in groups:
        counts = [shape.numel() for shape in group.values()]
        parts = [
            ParameterSlice(name, start, size, offset)
            for name, places in zip(group, pieces_of_stage_3(counts, ranks), strict=True)
            for where, offset, start, size in places
            if where == rank
        ]
        size = sum(-(-count // ranks) for count in counts)
        stepped.append(OptimizerTensor(torch.zeros(size).fill_(1.0), list(group), parts))
    optimizer = torch.optim.AdamW([each.tensor for each in stepped])
    names = [name for group in groups for name in group]
    return Target(optimizer, [Group(optimizer.param_groups[0], names)], stepped)


def anonymous() -> int:
    """Return the bytes of this process's own memory, without mapped files, which the system may drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class Highest:
    """The most memory that this process had while it held what it read from a file."""

    def __init__(self) -> None:
        self.bytes = 0

    def watch(self, saved: SavedState) -> SavedState:
        """Return the same state, whose reads are measured."""
        parameters = {
            name: replace(
                parameter,
                pieces={
                    key: [piece._replace(read=self._measured(piece.read)) for piece in pieces]
                    for key, pieces in parameter.pieces.items()
                },
            )
            for name, parameter in saved.parameters.items()
        }
        return replace(saved, parameters=parameters)

    def _measured(self, read: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
        def measured_read(first: int, last: int) -> Any:
            found = read(first, last)
            self.bytes = max(self.bytes, anonymous())
            return found

        return measured_read


def convert(folder: Path, groups: list[dict[str, torch.Size]], rank: int, ranks: int, answers: Any) -> None:
    """Measure one case in its own process."""
    torch.set_num_threads(1)
    ready = engine(groups, rank, ranks)
    highest = Highest()
    before, began = anonymous(), time.perf_counter()
    saved = highest.watch(open_format_2(folder))
    size = Filler(ready, saved, rank=rank, same_form=False).fill()
    took = time.perf_counter() - began
    moments = size * 2 // 3  # what the engine's optimizer has after it, and had not before
    answers.put({"s": took, "bytes": size, "beyond": highest.bytes - before - moments})


def measured(folder: Path, groups: list[dict[str, torch.Size]], rank: int, ranks: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=convert, args=(folder, groups, rank, ranks, answers))
    process.start()
    answer: dict[str, Any] = answers.get()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))  # noqa: S108 (memory, on purpose)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    named = shapes(options.width, options.layers)
    groups = sub_groups(named)
    count = sum(shape.numel() for shape in named.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        size = write(Path(scratch), named)
        print(
            f"{count / 1e6:.0f} million parameters, {size / 1e9:.2f} GB in {RANKS} parts, {len(groups)} sub-groups"
        )
        for ranks in (1, 2, 4, 8):
            runs = [measured(Path(scratch), groups, 0, ranks) for _ in range(options.repeats)]
            best = min(runs, key=lambda run: float(run["s"]))
            rate = best["bytes"] / best["s"]
            seven = BYTES * MISTRAL_7B / ranks
            beyond = max(run["beyond"] for run in runs) / 2**20
            print(
                f"2 -> {ranks}: {best['bytes'] / 1e9:.2f} GB to a rank in {best['s']:.2f} s, {rate / 1e9:.2f} GB/s, "
                f"{beyond:.0f} MiB beyond it; 7B: {seven / 1e9:.1f} GB in {seven / rate:.0f} s",
                json.dumps([round(run["s"], 2) for run in runs]),
                flush=True,
            )


if __name__ == "__main__":
    main()

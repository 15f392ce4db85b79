"""Measure the cost of converting a ZeRO-3 checkpoint for another engine or number of ranks: `.venv-trainer/bin/python bench/reshard.py`.

The parts of 2 ranks, written as DeepSpeed writes them, of a model with Mistral's layers made narrower. Each case is a
process of its own that fills an engine's tensors from them: time, and the memory that it had at its highest beyond
those tensors. Files are read from the page cache, where a checkpoint lies that was just restored.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.reshard.deepspeed_checkpoint import ZeroState, pieces_of_stage_3
from trainer.worker.reshard.fill import fill
from trainer.worker.reshard.optimizer_layout import Group, OptimizerTensor, ParameterSlice, Target

RANKS = 2
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


def write(folder: Path, groups: list[dict[str, torch.Size]]) -> int:
    """Write a checkpoint and return its bytes."""
    parts = folder / "global_step1"
    parts.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    sizes = [sum(-(-shape.numel() // RANKS) for shape in group.values()) for group in groups]
    for rank in range(RANKS):
        states = {
            number: {"step": torch.tensor(1.0), "exp_avg": torch.randn(size), "exp_avg_sq": torch.rand(size)}
            for number, size in enumerate(sizes)
        }
        base = {"state": states, "param_groups": [{"params": list(states), "lr": 1e-5}]}
        mine = {"optimizer_state_dict": base, "fp32_flat_groups": [torch.randn(size) for size in sizes]}
        mine |= {"dynamic_loss_scale": False}
        torch.save({"optimizer_state_dict": mine}, parts / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save({"param_shapes": groups}, parts / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return sum(path.stat().st_size for path in parts.iterdir())


def engine(groups: list[dict[str, torch.Size]], rank: int, ranks: int) -> Target:
    """Return what `rank` of `ranks` steps under ZeRO-3, or what a single process steps if there is one rank."""
    stepped = []
    for number, group in enumerate(groups):
        counts = [shape.numel() for shape in group.values()]
        parts = [
            ParameterSlice(name, piece.start, piece.size, piece.offset)
            for name, pieces in zip(group, pieces_of_stage_3(counts, ranks, number), strict=True)
            for piece in pieces
            if piece.rank == rank
        ]
        size = sum(-(-count // ranks) for count in counts)
        stepped.append(OptimizerTensor(torch.zeros(size).fill_(1.0), next(iter(group)), parts))
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
    """Measures this process's memory after each copy into the engine."""

    def __init__(self, saved: ZeroState) -> None:
        self.keys, self.rates, self.loss_scale = saved.keys, saved.rates, saved.loss_scale
        self.count, self.shared, self._saved = saved.count, saved.shared, saved
        self.bytes = 0

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        self._saved.copy(key, name, start, into)
        self.bytes = max(self.bytes, anonymous())


def convert(folder: Path, groups: list[dict[str, torch.Size]], rank: int, ranks: int, answers: Any) -> None:
    """Measure one case in its own process."""
    torch.set_num_threads(1)
    theirs = Identity.model_construct(engine="zero3", world_size=RANKS)
    ready = engine(groups, rank, ranks)
    before, began = anonymous(), time.perf_counter()
    saved = Highest(ZeroState(folder, theirs))
    size = fill(ready, saved)
    took = time.perf_counter() - began
    moments = size * 2 // 3  # what the engine's optimizer has after it, and had not before
    answers.put({"s": took, "bytes": size, "beyond": saved.bytes - before - moments})


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
    groups = sub_groups(shapes(options.width, options.layers))
    count = sum(shape.numel() for group in groups for shape in group.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        size = write(Path(scratch), groups)
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

"""Reads the checkpoints of release 0.1, which each engine's library wrote in its own files.

    one process, DDP   weights in safetensors; `optimizer.pt` has the states by the number of the parameter
    ZeRO-2             the parameters of a group are concatenated, and split into one partition per rank
                       (`deepspeed/runtime/zero/stage_1_and_2.py`)
    ZeRO-3             every parameter is split, and a rank's pieces of a sub-group are concatenated (`stage3.py`)
    FSDP2              a folder of torch.distributed.checkpoint for the model, and one for the optimizer (`dcp_folder`)

These files contain pickles (`pickles`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.worker.checkpoint import random_state
from trainer.worker.checkpoint.dcp_folder import DCP_INDEX, DcpFolder
from trainer.worker.checkpoint.pickles import load_mapped, load_random
from trainer.worker.checkpoint.state import (
    WEIGHTS,
    Piece,
    SavedParameter,
    SavedState,
    deepspeed_scaler,
    is_per_element,
)

Order = Sequence[Sequence[str]]
"""The names of each trained parameter (tied weights have several), in the optimizer's order."""
ADAPTER = "default"
"""PEFT's name of the trained adapter. Its files leave this name out of the weights' names."""
HIDDEN = "__bnb_optimizer_quant_state__"
"""The key under which bitsandbytes nests its state
(https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py, `state_dict`)."""
MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""Accelerate's names of DCP's folders."""
FORMAT_1_FILES = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "latest", "global_step*",
    "zero_to_*.py", MODEL, OPTIMIZER,
)  # fmt: skip
"""Patterns of the files that do not belong to a model."""


def open_format_1(folder: Path, engine: str, ranks: int, order: Order | None = None) -> SavedState:
    """Return the state of a checkpoint of format 1.

    Args:
        folder: the checkpoint.
        engine: the engine that wrote it.
        ranks: the number of processes that wrote it.
        order: the run's parameters. None: for the weights alone, which only sharded checkpoints need.
    """
    if engine in ("zero2", "zero3"):
        return _open_zero(folder, int(engine.removeprefix("zero")), ranks)
    if engine == "fsdp2":
        return _open_fsdp2(folder, ranks, order)
    return _open_replica(folder, ranks, order or ())


def required_files(folder: Path, engine: str, ranks: int) -> list[str]:
    """Return patterns of the files that a checkpoint must have. Transformers would silently resume without some."""
    random = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    common = ["scheduler.pt", *random]
    if engine == "fsdp2":
        indexes = [f"{part}/{DCP_INDEX}" for part in (MODEL, OPTIMIZER)]
        if any(not (folder / name).is_file() for name in indexes):
            return [*indexes, *common]
        files = [
            f"{part}/{file}" for part in (MODEL, OPTIMIZER) for file in sorted(DcpFolder(folder / part).files)
        ]
        return [*files, *common]
    if engine not in ("zero2", "zero3"):
        return ["optimizer.pt", "*model*.safetensors", *common]
    parts = [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    if engine == "zero3":
        parts += [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    else:
        parts.append("global_step*/mp_rank_00_model_states.pt")
    return ["latest", *parts, *common]


def find_random(folder: Path, ranks: int) -> Callable[[int], dict[str, Any]]:
    """Return the function that reads the random numbers of a rank."""

    def read(rank: int) -> dict[str, Any]:
        written = load_random(folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))
        cuda = written.get("cuda")
        mine = cuda[rank % len(cuda)] if isinstance(cuda, list) and cuda else cuda
        return random_state.pack(written["python"], written["numpy"], written["cpu"], mine)

    return read


def _groups(written: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the settings of the groups that have parameters."""
    return tuple(
        {key: value for key, value in group.items() if key != "params"}
        for group in written
        if group["params"]
    )


def _schedule(folder: Path) -> dict[str, Any]:
    return load_mapped(folder / "scheduler.pt")


def _torch_scaler(folder: Path) -> dict[str, Any] | None:
    path = folder / "scaler.pt"
    return {"library": "torch", **load_mapped(path)} if path.is_file() else None


def _unwrap(state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer state of one parameter, without the level of nesting that bitsandbytes adds."""
    return {**{key: value for key, value in state.items() if key != HIDDEN}, **state.get(HIDDEN, {})}


def _scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if getattr(value, "ndim", 0) == 0}


def _per_element(state: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        key: value for key, value in state.items() if hasattr(value, "ndim") and is_per_element(value, count)
    }


def _other(state: Mapping[str, Any], count: int) -> dict[str, Any]:
    known = _scalars(state).keys() | _per_element(state, count).keys()
    return {key: value for key, value in state.items() if key not in known}


def _whole(tensor: Any) -> list[Piece]:
    flat = tensor.reshape(-1)
    return [Piece(0, flat.numel(), lambda first, last: flat[first:last])]


def _open_replica(folder: Path, ranks: int, order: Order) -> SavedState:
    written = load_mapped(folder / "optimizer.pt")
    groups = [group for group in written["param_groups"] if group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    files = _open_safetensors(folder)
    parameters: dict[str, SavedParameter] = {}
    own: dict[str, dict[str, Any]] = {}
    for names, number in zip(order, numbers, strict=True):
        in_file = find_written_name(names, files)
        if in_file is None:
            continue
        weight = files[in_file].get_slice(in_file)
        shape = tuple(weight.get_shape())
        state, count = _unwrap(written["state"].get(number, {})), math.prod(shape)
        pieces = {key: _whole(value) for key, value in _per_element(state, count).items()}
        pieces[WEIGHTS] = [Piece(0, count, _reader_of(files[in_file], in_file))]
        parameters[names[0]] = SavedParameter(shape, pieces, _scalars(state))
        own[names[0]] = _other(state, count)
    return SavedState(
        parameters=parameters,
        groups=_groups(groups),
        schedule=_schedule(folder),
        scaler=_torch_scaler(folder),
        own=lambda _rank, first: own[first],
        own_keys=_names_of(own.values()),
        random=find_random(folder, ranks),
    )


def _names_of(states: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(sorted({key for state in states for key in state}))


def _reader_of(file: Any, name: str) -> Callable[[int, int], Any]:
    def read(first: int, last: int) -> Any:
        return file.get_tensor(name).reshape(-1)[first:last]

    return read


def _open_safetensors(folder: Path) -> dict[str, Any]:
    """Return the open file of each weight."""
    from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]

    names: Iterable[str] = [path.name for path in folder.glob("*model.safetensors")]
    for index in folder.glob("*model.safetensors.index.json"):
        names = set(json.loads(index.read_text())["weight_map"].values())
    opened = [safe_open(folder / name, framework="pt") for name in names]
    return {weight: file for file in opened for weight in file.keys()}  # noqa: SIM118 (not a dict)


def find_written_name(names: Iterable[str], files: Iterable[str]) -> str | None:
    """Return the name of a parameter in the files: one of `names`, or PEFT's form of it; None if it is in no file."""
    known = set(files)
    for name in names:
        without = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}", "")
        for written in (name, without, without.removesuffix(".weight")):
            if written in known:
                return written
    return None


def _open_zero(folder: Path, stage: int, ranks: int) -> SavedState:
    inner = folder / (folder / "latest").read_text().strip()
    parts = [
        load_mapped(_find(inner, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))["optimizer_state_dict"]
        for rank in range(ranks)
    ]
    bases = [part["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for part in parts]
    ids = [number for group in bases[0]["param_groups"] for number in group["params"]]
    states = [[_unwrap(base["state"].get(number, {})) for number in ids] for base in bases]
    flats = [part["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for part in parts]
    first = parts[0]
    paddings = [0] * len(flats[0]) if stage == 3 else first["group_paddings"]
    sizes = [flat.numel() + padding for flat, padding in zip(flats[0], paddings, strict=True)]
    name = "mp_rank_00_model_states.pt" if stage == 2 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model = load_mapped(_find(inner, name))
    shapes: list[dict[str, Any]] = model["param_shapes"]
    parameters: dict[str, SavedParameter] = {}
    numbers: dict[str, int] = {}
    for number, named in enumerate(shapes):
        counts = [shape.numel() for shape in named.values()]
        if stage == 3:
            located = pieces_of_stage_3(counts, ranks)
        else:
            located = pieces_of_stage_2(counts, first["param_alignment_paddings"][number], sizes[number])
        keys = _per_element(states[0][number], sizes[number])
        for (parameter, shape), places in zip(named.items(), located, strict=True):
            pieces = {WEIGHTS: _pieces(places, [flat[number] for flat in flats])}
            pieces |= {key: _pieces(places, [state[number][key] for state in states]) for key in keys}
            parameters[parameter] = SavedParameter(tuple(shape), pieces, _scalars(states[0][number]))
            numbers[parameter] = number
    if model["frozen_param_shapes"] == {}:  # not under an adapter, whose base has its own files
        for name in model["buffer_names"]:
            buffer = model["module"][name]
            parameters[name] = SavedParameter(tuple(buffer.shape), {WEIGHTS: _whole(buffer)})
    return SavedState(
        parameters=parameters,
        groups=_groups(bases[0]["param_groups"]),
        schedule=_schedule(folder),
        scaler=_zero_scaler(first),
        own=lambda rank, name: _other(states[rank][numbers[name]], sizes[numbers[name]]),
        own_keys=_names_of(_other(state, size) for state, size in zip(states[0], sizes, strict=True)),
        random=find_random(folder, ranks),
    )


def _zero_scaler(part: dict[str, Any]) -> dict[str, Any] | None:
    return deepspeed_scaler(part["loss_scaler"]) if part["dynamic_loss_scale"] else None


def _find(folder: Path, name: str) -> Path:
    """Return the file whose name ends with `name`. In bf16 DeepSpeed adds a prefix."""
    return next(folder.glob(f"*{name}"))


Place = tuple[int, int, int, int]
"""Elements of a parameter in DeepSpeed's files: rank, offset in the rank's tensor, first element, number."""


def pieces_of_stage_2(counts: list[int], paddings: list[int], partition: int) -> Iterator[list[Place]]:
    """Yield the places of each parameter of a group, which is split every `partition` elements.

    `counts` are the elements of the parameters, and `paddings` the elements of padding after each of them.
    """
    starts = accumulate((n + pad for n, pad in zip(counts, paddings, strict=True)), initial=0)
    for begin, count in zip(starts, counts, strict=False):
        places, at = [], begin
        while at < begin + count:
            rank, offset = divmod(at, partition)
            size = min(begin + count - at, partition - offset)
            places.append((rank, offset, at - begin, size))
            at += size
        yield places


def pieces_of_stage_3(counts: list[int], ranks: int) -> Iterator[list[Place]]:
    """Yield the places of each parameter of a sub-group. The last ranks may have a smaller piece, or none."""
    shares = [-(-count // ranks) for count in counts]
    for offset, count, share in zip(accumulate(shares, initial=0), counts, shares, strict=False):
        yield [
            (rank, offset, rank * share, min(share, count - rank * share))
            for rank in range(ranks)
            if rank * share < count
        ]


def _pieces(places: list[Place], flats: Sequence[Any]) -> list[Piece]:
    """Return pieces that read from the ranks' tensors."""

    def reader(rank: int, offset: int) -> Callable[[int, int], Any]:
        return lambda first, last: flats[rank].view(-1)[offset + first : offset + last]

    return [Piece(start, size, reader(rank, offset)) for rank, offset, start, size in places]


def _open_fsdp2(folder: Path, ranks: int, order: Order | None) -> SavedState:
    model, optimizer = DcpFolder(folder / MODEL), DcpFolder(folder / OPTIMIZER)
    weights = {model.paths[name][-1]: name for name in model.tensors}
    states: dict[str, dict[str, str]] = {}
    settings: dict[int, dict[str, str]] = {}
    for name, (_, kind, key, field) in ((name, path[:4]) for name, path in optimizer.paths.items()):
        if kind == "state" and name in optimizer.tensors:
            states.setdefault(key, {})[field] = name
        elif kind == "param_groups":
            settings.setdefault(key, {})[field] = name
    parameters: dict[str, SavedParameter] = {}
    for names in order if order is not None else [[name] for name in weights]:
        written = find_written_name(names, weights)
        if written is None:
            continue
        state = next((states[name] for name in names if name in states), {})
        shape = tuple(model.tensors[weights[written]].size)
        pieces = {key: optimizer.pieces(name) for key, name in state.items() if optimizer.tensors[name].size}
        pieces[WEIGHTS] = model.pieces(weights[written])
        scalars = {
            key: optimizer.pieces(name)[0].read(0, 1)[0]
            for key, name in state.items()
            if not optimizer.tensors[name].size
        }
        parameters[names[0]] = SavedParameter(shape, pieces, scalars)
    groups = [
        {key: optimizer.value(name) for key, name in group.items()} for _, group in sorted(settings.items())
    ]
    return SavedState(
        parameters=parameters,
        groups=_groups(groups),
        schedule=_schedule(folder),
        scaler=_torch_scaler(folder),
        own=lambda _rank, _first: {},
        own_keys=(),
        random=find_random(folder, ranks),
    )

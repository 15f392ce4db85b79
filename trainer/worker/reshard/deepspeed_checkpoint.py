"""The parts that DeepSpeed's ranks wrote, of ZeRO 2 or 3, as one state.

ZeRO 2 lays a group's parameters one after the other and cuts the whole in as many partitions as there are ranks
(`deepspeed/runtime/zero/stage_1_and_2.py`); ZeRO 3 cuts every parameter, and lays a rank's pieces of a sub-group
one after the other (`stage3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.worker.checkpoint_identity import Identity
from trainer.worker.reshard.checkpoint_state import (
    MODEL_PARTS,
    OPTIMIZER_PARTS,
    WEIGHTS,
    mapped,
    own_keys,
    single,
    unwrapped,
)


class Piece(NamedTuple):
    """Where some of a parameter's elements are: in a rank's tensor of a group, from `offset` on."""

    rank: int
    group: int
    offset: int
    start: int
    """Of the parameter's elements, the first that is here."""
    size: int


class Rank(NamedTuple):
    """What one rank wrote of the optimizer, by group (ZeRO 2) or sub-group (ZeRO 3)."""

    weights: list[Any]
    states: list[dict[str, Any]]
    rates: tuple[float, ...]
    padding: list[int]
    """Elements at the end of `weights` that were left out, as they pad the partition."""
    scale: float | None


def pieces_of_stage_2(
    counts: list[int], paddings: list[int], partition: int, group: int
) -> Iterator[list[Piece]]:
    """For each parameter of a group, cut at every `partition` elements; `paddings` follow each."""
    starts = accumulate((n + pad for n, pad in zip(counts, paddings, strict=True)), initial=0)
    for begin, count in zip(starts, counts, strict=False):
        pieces, at = [], begin
        while at < begin + count:
            rank, offset = divmod(at, partition)
            here = min(begin + count - at, partition - offset)
            pieces.append(Piece(rank, group, offset, at - begin, here))
            at += here
        yield pieces


def pieces_of_stage_3(counts: list[int], ranks: int, group: int) -> Iterator[list[Piece]]:
    """For each parameter of a sub-group; the last ranks may have less of it, or nothing."""
    shares = [-(-count // ranks) for count in counts]
    for offset, count, share in zip(accumulate(shares, initial=0), counts, shares, strict=False):
        yield [
            Piece(rank, group, offset, rank * share, min(share, count - rank * share))
            for rank in range(ranks)
            if rank * share < count
        ]


class ZeroState:
    """A checkpoint of ZeRO 2 or 3, as `Saved`."""

    def __init__(self, folder: Path, theirs: Identity) -> None:
        """Raises `UserError` if the optimizer's numbers cannot be cut in another way."""
        self._folder = folder / (folder / "latest").read_text().strip()
        self._stage = int(theirs.engine.removeprefix("zero"))
        self._ranks = [self._rank(number) for number in range(theirs.world_size)]
        first = self._ranks[0]
        states = [(state, self._size(first, group)) for group, state in enumerate(first.states)]
        self.keys, odd = own_keys(states)
        if odd:
            raise cannot_cut(odd)
        self.rates = first.rates
        self.loss_scale = first.scale

    def count(self, name: str) -> int | None:
        pieces = self._pieces.get(name)
        return sum(piece.size for piece in pieces) if pieces is not None else None

    def copy(self, key: str, name: str, start: int, into: Any) -> None:
        end = start + into.numel()
        for piece in self._pieces[name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.size)
            if first < last:
                rank = self._ranks[piece.rank]
                source = rank.weights[piece.group] if key == WEIGHTS else rank.states[piece.group][key]
                at = piece.offset + first - piece.start
                into[first - start : last - start].copy_(source.view(-1)[at : at + last - first])

    def shared(self, name: str) -> dict[str, Any]:
        piece = self._pieces[name][0]
        return single(self._ranks[piece.rank].states[piece.group])

    def _rank(self, number: int) -> Rank:
        written: dict[str, Any] = mapped(self._one(f"zero_pp_rank_{number}_mp_rank_00_{OPTIMIZER_PARTS}"))
        part: dict[str, Any] = written["optimizer_state_dict"]
        base = part["optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"]
        weights = part["fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"]
        groups = [group for group in base["param_groups"] if group["params"]]
        ids = [each for group in groups for each in group["params"]]
        return Rank(
            weights=weights,
            states=[unwrapped(base["state"].get(each, {})) for each in ids],
            rates=tuple(float(group["lr"]) for group in groups),
            padding=[0] * len(weights) if self._stage == 3 else part["group_paddings"],
            scale=float(part["loss_scaler"].cur_scale) if part["dynamic_loss_scale"] else None,
        )

    def _one(self, name: str) -> Path:
        """The file of that name, which in bf16 begins otherwise."""
        return next(self._folder.glob(f"*{name}"))

    def _size(self, rank: Rank, group: int) -> int:
        return int(rank.weights[group].numel()) + rank.padding[group]

    @cached_property
    def _pieces(self) -> dict[str, list[Piece]]:
        """Of every parameter that is trained, by its name."""
        name = f"mp_rank_00_{MODEL_PARTS}" if self._stage == 2 else f"zero_pp_rank_0_mp_rank_00_{MODEL_PARTS}"
        shapes: list[dict[str, Any]] = mapped(self._one(name))["param_shapes"]
        found: dict[str, list[Piece]] = {}
        for group, named in enumerate(shapes):
            counts = [shape.numel() for shape in named.values()]
            found |= zip(named, self._of_group(group, counts), strict=True)
        return found

    def _of_group(self, group: int, counts: list[int]) -> Iterator[list[Piece]]:
        if self._stage == 3:
            return pieces_of_stage_3(counts, len(self._ranks), group)
        paddings = self._alignment()[group]
        return pieces_of_stage_2(counts, paddings, self._size(self._ranks[0], group), group)

    def _alignment(self) -> list[list[int]]:
        written = mapped(self._one(f"zero_pp_rank_0_mp_rank_00_{OPTIMIZER_PARTS}"))
        paddings: list[list[int]] = written["optimizer_state_dict"]["param_alignment_paddings"]
        return paddings


def cannot_cut(key: str) -> UserError:
    return UserError(
        f"the optimizer keeps `{key}`, which is not one number for each weight: it cannot be cut for another engine "
        "or number of processes",
        hint="go on with as many GPUs of the same kind, or start another run with `optim: adamw_torch`",
    )

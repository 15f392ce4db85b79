"""The files that DeepSpeed's ranks wrote under ZeRO-2 or ZeRO-3, read as one state.

ZeRO-2 concatenates the parameters of a group and splits the result into one partition per rank
(`deepspeed/runtime/zero/stage_1_and_2.py`). ZeRO-3 splits every parameter, and concatenates a rank's pieces of a
sub-group (`stage3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from trainer.worker.checkpoint_identity import Identity
from trainer.worker.reshard.checkpoint_state import (
    MODEL_PARTS,
    OPTIMIZER_PARTS,
    WEIGHTS,
    cannot_reshard,
    find_element_keys,
    load_mapped,
    select_shared,
    unwrap_state,
)


class Piece(NamedTuple):
    """Where consecutive elements of a parameter are: at `offset` in a rank's tensor of a group."""

    rank: int
    group: int
    offset: int
    start: int
    """Index of the first of these elements in the parameter."""
    size: int


class Rank(NamedTuple):
    """The optimizer state that one rank wrote, by group (ZeRO-2) or sub-group (ZeRO-3)."""

    weights: list[Any]
    states: list[dict[str, Any]]
    rates: tuple[float, ...]
    padding: list[int]
    """Elements of padding at the end of each partition, which are not in `weights`."""
    scale: float | None


def pieces_of_stage_2(
    counts: list[int], paddings: list[int], partition: int, group: int
) -> Iterator[list[Piece]]:
    """Yield the pieces of each parameter of a group, which is split every `partition` elements.

    `counts` are the elements of the parameters, and `paddings` the elements of padding after each of them.
    """
    starts = accumulate((n + pad for n, pad in zip(counts, paddings, strict=True)), initial=0)
    for begin, count in zip(starts, counts, strict=False):
        pieces, at = [], begin
        while at < begin + count:
            rank, offset = divmod(at, partition)
            size = min(begin + count - at, partition - offset)
            pieces.append(Piece(rank, group, offset, at - begin, size))
            at += size
        yield pieces


def pieces_of_stage_3(counts: list[int], ranks: int, group: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each parameter of a sub-group. The last ranks may have a smaller piece, or none."""
    shares = [-(-count // ranks) for count in counts]
    for offset, count, share in zip(accumulate(shares, initial=0), counts, shares, strict=False):
        yield [
            Piece(rank, group, offset, rank * share, min(share, count - rank * share))
            for rank in range(ranks)
            if rank * share < count
        ]


class ZeroState:
    """The `CheckpointState` of a ZeRO-2 or ZeRO-3 checkpoint."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Open the files of all ranks.

        Raises:
            UserError: the optimizer's state cannot be resharded.
        """
        self._folder = folder / (folder / "latest").read_text().strip()
        self._stage = int(identity.engine.removeprefix("zero"))
        self._ranks = [self._read_rank(number) for number in range(identity.world_size)]
        first = self._ranks[0]
        states = [(state, self._size(first, group)) for group, state in enumerate(first.states)]
        self.keys, odd = find_element_keys(states)
        if odd:
            raise cannot_reshard(odd)
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
        return select_shared(self._ranks[piece.rank].states[piece.group])

    def _read_rank(self, number: int) -> Rank:
        written: dict[str, Any] = load_mapped(
            self._find_file(f"zero_pp_rank_{number}_mp_rank_00_{OPTIMIZER_PARTS}")
        )
        part: dict[str, Any] = written["optimizer_state_dict"]
        base = part["optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"]
        weights = part["fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"]
        groups = [group for group in base["param_groups"] if group["params"]]
        ids = [each for group in groups for each in group["params"]]
        return Rank(
            weights=weights,
            states=[unwrap_state(base["state"].get(each, {})) for each in ids],
            rates=tuple(float(group["lr"]) for group in groups),
            padding=[0] * len(weights) if self._stage == 3 else part["group_paddings"],
            scale=float(part["loss_scaler"].cur_scale) if part["dynamic_loss_scale"] else None,
        )

    def _find_file(self, name: str) -> Path:
        """Return the file whose name ends with `name`. In bf16 DeepSpeed adds a prefix."""
        return next(self._folder.glob(f"*{name}"))

    def _size(self, rank: Rank, group: int) -> int:
        return int(rank.weights[group].numel()) + rank.padding[group]

    @cached_property
    def _pieces(self) -> dict[str, list[Piece]]:
        """The pieces of every trained parameter, by name."""
        name = f"mp_rank_00_{MODEL_PARTS}" if self._stage == 2 else f"zero_pp_rank_0_mp_rank_00_{MODEL_PARTS}"
        shapes: list[dict[str, Any]] = load_mapped(self._find_file(name))["param_shapes"]
        found: dict[str, list[Piece]] = {}
        for group, named in enumerate(shapes):
            counts = [shape.numel() for shape in named.values()]
            found |= zip(named, self._list_pieces(group, counts), strict=True)
        return found

    def _list_pieces(self, group: int, counts: list[int]) -> Iterator[list[Piece]]:
        if self._stage == 3:
            return pieces_of_stage_3(counts, len(self._ranks), group)
        paddings = self._read_paddings()[group]
        return pieces_of_stage_2(counts, paddings, self._size(self._ranks[0], group), group)

    def _read_paddings(self) -> list[list[int]]:
        written = load_mapped(self._find_file(f"zero_pp_rank_0_mp_rank_00_{OPTIMIZER_PARTS}"))
        paddings: list[list[int]] = written["optimizer_state_dict"]["param_alignment_paddings"]
        return paddings

"""The tensors that an engine's optimizer steps, and which slices of parameters each tensor contains."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class ParameterSlice(NamedTuple):
    """Elements `start` to `start + size` of a parameter, which are at `offset` in a tensor."""

    name: str
    start: int
    size: int
    offset: int


class OptimizerTensor(NamedTuple):
    """A tensor that the optimizer steps: a contiguous tensor, or a DTensor of which this rank has a shard.

    Elements that no slice covers are padding.
    """

    tensor: Any
    names: list[str]
    """All parameters in this tensor, on this rank or another. They have the same step."""
    parts: list[ParameterSlice]

    @property
    def first(self) -> str:
        return self.names[0]


class Group(NamedTuple):
    """An optimizer group that has parameters."""

    settings: dict[str, Any]
    """torch's `param_group`."""
    names: list[str]


class Target(NamedTuple):
    """An engine's optimizer, prepared but without state."""

    optimizer: Any
    """The innermost optimizer: torch's, or one with the same interface."""
    groups: list[Group]
    stepped: list[OptimizerTensor]

    @property
    def names(self) -> list[str]:
        """All trained parameters in the optimizer's order, which is the same under every engine."""
        return [name for group in self.groups for name in group.names]


def find_target(trainer: Any, engine: str) -> Target:
    """Return the target of a trainer whose model and optimizer are prepared."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    if engine == "zero3":
        return _stage_3(trainer.deepspeed.optimizer, names)
    if engine == "zero2":
        return _stage_2(trainer.deepspeed.optimizer, names)
    optimizer = trainer.optimizer.optimizer
    filled = [group for group in optimizer.param_groups if group["params"]]
    groups = [Group(group, [names[each] for each in group["params"]]) for group in filled]
    trained = [each for group in filled for each in group["params"]]
    part_of = _rows if engine == "fsdp2" else _all_of
    stepped = [OptimizerTensor(each, [names[each]], part_of(each, names[each])) for each in trained]
    return Target(optimizer, groups, stepped)


def _all_of(weight: Any, name: str) -> list[ParameterSlice]:
    return [ParameterSlice(name, 0, weight.numel(), 0)]


def _rows(weight: Any, name: str) -> list[ParameterSlice]:
    """Return the slice of a weight that this rank has under FSDP2, which shards by rows; an empty list if it has none."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if tuple(shape[1:]) != tuple(weight.shape[1:]):
        raise RuntimeError(f"{name} is not sharded by rows: {weight.placements}")
    size = math.prod(shape)
    return [ParameterSlice(name, offset[0] * math.prod(shape[1:]), size, 0)] if size else []


def _stage_3(zero: Any, names: dict[Any, str]) -> Target:
    """Return the target of a `DeepSpeedZeroOptimizer_Stage3`, which splits every parameter over the ranks."""
    import torch.distributed as dist

    rank = dist.get_rank(zero.dp_process_group)
    groups: dict[int, list[str]] = {}  # by number
    stepped = []
    for number, (members, flat) in enumerate(
        zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    ):
        groups.setdefault(zero.sub_group_to_group_id[number], []).extend(names[each] for each in members)
        parts, offset = [], 0
        for each in members:
            share = each.partition_numel()
            start = rank * share
            if start < each.ds_numel:
                parts.append(ParameterSlice(names[each], start, min(share, each.ds_numel - start), offset))
            offset += share
        stepped.append(OptimizerTensor(flat, [names[each] for each in members], parts))
    settings = zero.optimizer.param_groups
    return Target(zero.optimizer, [Group(settings[number], each) for number, each in groups.items()], stepped)


def _stage_2(zero: Any, names: dict[Any, str]) -> Target:
    """Return the target of a `DeepSpeedZeroOptimizer`, whose groups are one tensor each over all ranks."""
    import torch.distributed as dist

    stepped = []
    for number, flat in enumerate(zero.single_partition_of_fp32_groups):
        begin = dist.get_rank(zero.real_dp_process_group[number]) * flat.numel()
        laid = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
        parts = [
            part for each, at in laid if (part := _within(names[each], at, each.numel(), begin, flat.numel()))
        ]
        stepped.append(OptimizerTensor(flat, [names[each] for each in zero.bit16_groups[number]], parts))
    members = [[names[each] for each in group] for group in zero.bit16_groups]
    return Target(zero.optimizer, list(map(Group, zero.optimizer.param_groups, members)), stepped)


def _within(name: str, at: int, count: int, begin: int, size: int) -> ParameterSlice | None:
    """Return the slice of a parameter within the `size` elements from `begin` on; None if it has none there.

    The parameter has `count` elements, and is at `at` in the concatenation of all ranks.
    """
    first, last = max(at, begin), min(at + count, begin + size)
    return ParameterSlice(name, first - at, last - first, first - begin) if first < last else None

"""Format the rounds of the cases of `bench/train.py` as Markdown tables."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from train_sides import Trained

WARM_UP = 2
"""Steps that are not timed, the first included."""


class Case(NamedTuple):
    """One row of the table, with its own settings."""

    name: str
    side: str
    settings: dict[str, Any]
    plain: bool = False


class Measured:
    """The rounds of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rounds: list[Trained] = []

    @property
    def wall_s(self) -> list[float]:
        """Return the seconds of each timed step."""
        return [second for each in self.rounds for second in each.step_s[WARM_UP - 1 :]]

    @property
    def cpu_s(self) -> list[float]:
        return [second for each in self.rounds for second in each.step_cpu_s[WARM_UP - 1 :]]

    def reference_s(self, *, cpu: bool) -> float:
        """Return the seconds of the pass before the steps."""
        return statistics.median(each.reference_cpu_s if cpu else each.reference_s for each in self.rounds)

    def epoch_s(self, steps: int, *, cpu: bool) -> float:
        """Return the median over rounds of the mean step. Steps have different rows, so their mean is used."""
        rounds = [(each.step_cpu_s if cpu else each.step_s)[WARM_UP - 1 :] for each in self.rounds]
        return self.reference_s(cpu=cpu) + steps * statistics.median(map(statistics.fmean, rounds))


def table(measured: list[Measured], options: argparse.Namespace, tokens: int) -> None:
    """Return the time of a step, in CPU seconds if the CPU trains: other processes disturb those least."""
    cpu = options.device == "cpu"
    unit = "CPU s" if cpu else "s"
    print(
        f"| | wall s a step, median (range) | {unit} a step | reference, {unit} | epoch, {unit} | steps/{unit} "
        f"| tokens/{unit} | of the first |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    first = measured[0].epoch_s(options.steps, cpu=cpu)
    for each in measured:
        total, steps = each.epoch_s(options.steps, cpu=cpu), each.cpu_s if cpu else each.wall_s
        print(
            f"| {each.case.name} | {_spread(each.wall_s)} | {_spread(steps)} | {each.reference_s(cpu=cpu):.1f} "
            f"| {total:.1f} | {options.steps / total:.3f} | {tokens / total:.0f} | {first / total:.2f}x |"
        )


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


def losses(measured: list[Measured]) -> None:
    """Compare each case's loss curve with the first case's, and the rounds of a case with each other."""
    first = measured[0].rounds[0].losses
    print(
        "\n| losses against the first's | largest difference | mean drift | rounds equal |\n|---|--:|--:|---|"
    )
    for each in measured:
        curve = each.rounds[0].losses
        apart = [mine - theirs for mine, theirs in zip(curve, first, strict=True)]
        equal = all(other.losses == curve for other in each.rounds)
        print(
            f"| {each.case.name} | {max(map(abs, apart)):.1e} | {statistics.fmean(apart):+.1e} | {'yes' if equal else 'no'} |"
        )


def padding(lengths: list[int], options: argparse.Namespace) -> None:
    """Count the positions that the collators make of each global batch: in file order, and sorted by length."""

    def computed(order: Callable[[list[int]], list[int]]) -> int:
        batches = (lengths[at : at + options.batch] for at in range(0, len(lengths), options.batch))
        cut = (
            order(batch)[at : at + options.micro_batch]
            for batch in batches
            for at in range(0, options.batch, options.micro_batch)
        )
        return sum(max(micro) * len(micro) for micro in cut)

    plain, grouped = computed(list), computed(lambda batch: sorted(batch, reverse=True))
    real = sum(lengths)
    print(
        f"\nPositions of a longer half or chat: {real} tokens, {plain} computed in plain order "
        f"({plain / real - 1:.0%} padding), {grouped} by length ({grouped / real - 1:.0%})."
    )


def overhead(measured: list[Measured], options: argparse.Namespace) -> None:
    """Format what our timed runs spent outside the model's work."""
    watched = [each for case in measured for each in case.rounds if each.times]
    cpu = options.device == "cpu"
    step_s = statistics.median(
        second for each in watched for second in (each.step_cpu_s if cpu else each.step_s)
    )
    print(f"\n| ours beside the model, of a step of {step_s:.2f} s | ms a step | share |\n|---|--:|--:|")
    names = list(dict.fromkeys(name for each in watched for name in each.times))
    values = {
        name: statistics.median(each.times.get(name, 0.0) for each in watched) / options.steps
        for name in names
    }
    values["all of it"] = sum(value for name, value in values.items() if not name.startswith("of it"))
    for name, value in sorted(values.items(), key=lambda item: item[0] == "all of it"):
        print(f"| {name} | {1000 * value:.2f} | {value / step_s:.3%} |")
    share = statistics.median(each.supervisor for each in watched)
    print(f"\nThe supervisor, a process of its own: {share:.2%} of one core, its start and upload included.")

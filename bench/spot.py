"""Compare expected with replayed spot runs: `python bench/spot.py FOLDER` prints the tables of `bench/spot.md`.

FOLDER holds traces as https://github.com/skypilot-org/spot-traces has them: `{"metadata": {"gap_seconds": ...},
"data": [machines that could be had at each tick]}`. A run is replayed from many offsets of a trace, which is taken
as a ring so that none is cut off, and the mean is set beside `launcher.plan.spot.spot_expectation` with the trace's own
rate of preemptions and its own mean wait.
"""

from __future__ import annotations

import bisect
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

from launcher.plan.spot import HOUR_S, best_interval, spot_expectation  # noqa: E402

OFFSETS = 200
LENGTHS_H = (4.0, 12.0, 48.0)
SAVE_S, UPLOAD_S, RESTORE_S, LOAD_S = 5.0, 100.0, 105.0, 400.0
"""Seconds of an upload for full DPO of a 7B model on 8 GPUs, roughly: 100 GB at 1 GB/s."""


class Trace(NamedTuple):
    """The times at which a machine was available: ordered seconds of starts and ends, repeated in a loop."""

    name: str
    length_s: float
    ups: tuple[tuple[float, float], ...]

    @property
    def up_s(self) -> float:
        return sum(end - start for start, end in self.ups)

    @property
    def per_h(self) -> float:
        """Preemptions per hour of a held machine."""
        return len(self.ups) / (self.up_s / HOUR_S)

    @property
    def wait_h(self) -> float:
        """Mean wait after a preemption."""
        return (self.length_s - self.up_s) / len(self.ups) / HOUR_S

    @property
    def first_wait_h(self) -> float:
        """Mean wait from a random moment, which falls into long gaps more often than into short ones."""
        downs = [after - end for (_, end), (after, _) in zip(self.ups, self.ups[1:], strict=False)]
        downs.append(self.ups[0][0] + self.length_s - self.ups[-1][1])
        return sum(down**2 for down in downs) / 2 / self.length_s / HOUR_S


class Replay(NamedTuple):
    """One run."""

    hours: float
    paid_hours: float
    preemptions: int


def read(path: Path, root: Path) -> Trace | None:
    """Read a trace for the most machines that it had at once; None if no machine was ever lost."""
    data = json.loads(path.read_text())
    gap, counts = float(data["metadata"]["gap_seconds"]), data["data"]
    most = max(counts)
    ups: list[tuple[float, float]] = []
    for tick, count in enumerate(counts):
        if count >= most:
            start = ups.pop()[0] if ups and ups[-1][1] == tick * gap else tick * gap
            ups.append((start, (tick + 1) * gap))
    length = len(counts) * gap
    if len(ups) > 1 and ups[0][0] == 0 and ups[-1][1] == length:  # one that goes on over the ring's seam
        ups[-1] = (ups[-1][0], length + ups.pop(0)[1])
    if ups[0] == (0.0, length):
        return None
    return Trace(str(path.relative_to(root).with_suffix("")), length, tuple(ups))


def replay(trace: Trace, offset_s: float, work_s: float, interval_s: float) -> Replay:
    """Replay a run from a moment of a trace, save by save and loss by loss, without any expectation."""
    now, paid, done, lost = offset_s, 0.0, 0.0, 0
    start_s = LOAD_S
    while True:
        begin, end = next_up(trace, now)
        finished, done = attempt(end - begin - start_s, done, work_s, interval_s)
        if finished is not None:
            paid += start_s + finished
            return Replay((begin + start_s + finished - offset_s) / HOUR_S, paid / HOUR_S, lost)
        now, paid, lost = end, paid + end - begin, lost + 1
        start_s = LOAD_S + (RESTORE_S if done else 0.0)


def attempt(room_s: float, done: float, work_s: float, interval_s: float) -> tuple[float | None, float]:
    """Return the seconds to the end of the run, or None, and the committed work of a machine that lasts `room_s` seconds."""
    now, committed = 0.0, done
    while True:
        step = min(interval_s, work_s - done)
        now, done = now + step + SAVE_S, done + step
        if now + UPLOAD_S > room_s:
            return None, committed
        committed = done
        if done >= work_s - 1e-6:
            return now + UPLOAD_S, committed


def next_up(trace: Trace, now: float) -> tuple[float, float]:
    """Return from when, at `now` or later, and until when a machine is held."""
    lap, at = divmod(now, trace.length_s)
    ends = [end for _, end in trace.ups]
    if ends[-1] > trace.length_s and at < ends[-1] - trace.length_s:
        return now, lap * trace.length_s + ends[-1] - trace.length_s
    index = bisect.bisect_right(ends, at)
    if index == len(ends):
        lap, index, at = lap + 1, 0, 0.0
    start, end = trace.ups[index]
    return lap * trace.length_s + max(start, at), lap * trace.length_s + end


def row(trace: Trace, work_h: float) -> str:
    interval = best_interval(save_s=SAVE_S, upload_s=UPLOAD_S, preemptions_per_h=trace.per_h, work_h=work_h)
    runs = [
        replay(trace, trace.length_s * index / OFFSETS, work_h * HOUR_S, interval) for index in range(OFFSETS)
    ]
    expected = spot_expectation(
        work_h=work_h, save_s=SAVE_S, upload_s=UPLOAD_S, restore_s=RESTORE_S, load_s=LOAD_S,
        provision_h=trace.wait_h, preemptions_per_h=trace.per_h,
    )  # fmt: skip
    hours = statistics.fmean(run.hours for run in runs)
    paid = statistics.fmean(run.paid_hours for run in runs)
    lost = statistics.fmean(run.preemptions for run in runs)
    wall = expected.hours - trace.wait_h + trace.first_wait_h
    return (
        f"| {work_h:.0f} | {expected.interval_s / 60:.0f} | {lost:.1f} | {expected.preemptions:.1f} "
        f"| {paid:.1f} | {expected.paid_hours:.1f} | {expected.paid_hours / paid - 1:+.0%} "
        f"| {hours:.1f} | {wall:.1f} | {wall / hours - 1:+.0%} |"
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/spot.py FOLDER_OF_TRACES")
    root = Path(sys.argv[1])
    head = "| work h | save every min | lost | expected | paid h | expected | off | hours | expected | off |"
    for path in sorted(root.rglob("*.json")):
        trace = read(path, root)
        if trace is None:
            print(f"\n### {path.relative_to(root).with_suffix('')}: never lost\n")
            continue
        print(
            f"\n### {trace.name}\n{trace.length_s / 86400:.1f} days, up {trace.up_s / trace.length_s:.0%}; "
            f"lost {len(trace.ups)} times, {trace.per_h:.3f} an hour held; mean wait {trace.wait_h:.2f} h\n"
        )
        print(head, "|--:" * 10 + "|", *(row(trace, hours) for hours in LENGTHS_H), sep="\n")


if __name__ == "__main__":
    main()

"""Curves over the steps: what counted, what was lost and done again, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.runs.account import how
from launcher.runs.run import RunHistory, values
from launcher.runs.time_breakdown import useful_until
from trainer.events import of_kind
from trainer.metrics import CURVES, Metric

Points = list[tuple[float, float]]
"""Steps and values."""


class Curve(NamedTuple):
    """A line of a panel."""

    label: str
    kind: str
    """CSS class: colour and dashes."""
    points: Points
    marked: bool = False
    """Each point is one, such as an evaluation."""
    noisy: bool = False
    """A mean is drawn over it."""


@dataclass(frozen=True)
class Panel:
    """What is drawn over the steps in one frame."""

    title: str
    unit: str
    """Of the upward axis."""
    curves: tuple[Curve, ...]
    last_step: int
    redone: tuple[tuple[int, int], ...] = ()
    """Spans of steps that were taken more than once."""
    losses: tuple[tuple[int, str], ...] = ()
    """Steps at which an attempt ended, and how: `1 lost`."""


def panels(run: RunHistory) -> list[Panel]:
    """The loss, and an accuracy if there is one."""
    found = [_panel(run, metric) for metric in CURVES]
    shown = [panel for panel in found if any(curve.points for curve in panel.curves)]
    return shown[:2]


def compared(runs: Sequence[RunHistory], names: Sequence[str]) -> list[Panel]:
    """The same of several runs in one frame, each with a style of its own."""
    found = []
    for metric in CURVES:
        curves = [
            Curve(
                f"{name} {what}".strip(),
                f"{kind} run{nth}",
                _points(run, key, tested=tested),
                tested,
                not tested,
            )
            for nth, (run, name) in enumerate(zip(runs, names, strict=True))
            for what, kind, key, tested in (
                ("", "train", metric.key, False),
                ("test", "test", metric.test_key, True),
            )
        ]
        last = max((run.total_steps or run.step for run in runs), default=1)
        if any(curve.points for curve in curves):
            found.append(Panel(metric.title.capitalize(), metric.unit, tuple(curves), last))
    return found[:2]


def _panel(run: RunHistory, metric: Metric) -> Panel:
    lost = []
    for attempt in run.attempts:
        after = useful_until(run, attempt)
        events = [event for event in of_kind(attempt.events, "step") if event["step"] >= after]
        if attempt.step > after:
            lost.append(Curve("", "lost", _pairs(*values(events, metric.key))))
    ended = [attempt for attempt in run.attempts if how(run, attempt) not in ("done", "at work")]
    return Panel(
        metric.title.capitalize(),
        metric.unit,
        (
            Curve("train", "train", _points(run, metric.key, tested=False), noisy=True),
            *lost,
            Curve("test", "test", _points(run, metric.test_key, tested=True), marked=True),
        ),
        run.total_steps or max(run.step, 1),
        tuple((span.after, span.until) for span in run.redone),
        tuple((attempt.step, f"{attempt.number} {how(run, attempt)}") for attempt in ended),
    )


def _points(run: RunHistory, key: str, *, tested: bool) -> Points:
    return _pairs(*values(run.evals if tested else run.steps, key))


def _pairs(steps: Sequence[int], numbers: Sequence[float]) -> Points:
    return [(float(step), number) for step, number in zip(steps, numbers, strict=True)]

"""The summary of a run that `submit` prints at its end: facts for a table, and its curves as one picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.render import change, duration, size, usd
from launcher.runs.run import RunHistory, values
from trainer.bucket.address import folder_of
from trainer.events import of_kind
from trainer.method import METHODS
from trainer.metrics import LEARNING_RATE, LOSS, REWARD_ACCURACY, TOKEN_ACCURACY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, TEST, DEATH, GREY = "#0072B2", "#D55E00", "#000000", "0.55"
"""Okabe and Ito's colours, which colour-blind readers can distinguish; markers and line styles work in greyscale."""
DPI = 130

Ends = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """The facts of a run; the names contain the units."""

    run: str
    method: str
    state: str
    step: int
    total_steps: int | None
    attempts: int
    preemptions: int
    restores: int
    lost_steps: int
    commits: int
    train_loss: Ends | None
    test: Ends | None
    """First and last value of `test_metric`; None without evaluations."""
    test_metric: str
    wall_s: float
    usd: float | None
    """None if no price is known."""
    final: str | None
    final_bytes: int | None
    weights_digest: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for JSON output."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values for a table."""
        of = "" if self.total_steps is None else f" of {self.total_steps}"
        redone = f"{self.lost_steps} redone" if self.lost_steps else "none redone"
        metric = next(metric for metric in (LOSS, REWARD_ACCURACY) if metric.test_key == self.test_metric)
        bytes_ = f" ({size(self.final_bytes)})" if self.final_bytes is not None else ""
        return [
            ("run", self.run),
            ("method", self.method or "?"),
            ("state", self.state),
            ("steps", f"{self.step}{of}, {redone}"),
            ("attempts", f"{self.attempts}, {self.preemptions} preempted, {self.restores} restored"),
            ("checkpoints committed", str(self.commits)),
            ("train loss", change(self.train_loss)),
            (f"test {metric.title}", change(self.test, metric.test_format)),
            ("wall time", duration(self.wall_s)),
            *([("dollars", usd(self.usd))] if self.usd is not None else []),
            ("final model", f"{self.final}{bytes_}" if self.final else "not yet"),
            ("weights digest", self.weights_digest or "not yet"),
        ]


def summary(run: RunHistory, *, usd_per_h: float | None = None) -> Summary:
    """Return the facts of a run.

    Args:
        run: its history.
        usd_per_h: price to assume for attempts without one.
    """
    metric = METHODS[run.method].test_metric if run.method in METHODS else LOSS.test_key
    exported = next(iter(reversed(of_kind(run.events, "exported"))), {})
    return Summary(
        run=run.run_id,
        method=run.method,
        state=run.state,
        step=run.step,
        total_steps=run.total_steps,
        attempts=len(run.attempts),
        preemptions=run.preemptions,
        restores=len(run.restores),
        lost_steps=run.lost_steps,
        commits=len(run.commits),
        train_loss=_ends(values(run.steps, LOSS.key)[1]),
        test=_ends(values(run.evals, metric)[1]),
        test_metric=metric,
        wall_s=run.wall_s,
        usd=run.cost(usd_per_h=usd_per_h).usd,
        final=run.final_uri if run.finished else None,
        final_bytes=exported.get("bytes"),
        weights_digest=exported.get("weights_digest"),
    )


def picture_path(checkpoints: str, run_id: str, *, home: Path) -> Path:
    """Return where the picture goes: into the run's folder if the runs are in a folder, else into `home`."""
    folder = folder_of(checkpoints)
    return (home if folder is None else folder / run_id) / "report.png"


def draw(run: RunHistory, path: Path) -> None:
    """Write the run's curves to `path` as PNG: loss, accuracy, and the attempts.

    A dashed line marks a lost attempt, a triangle a restore, and shading the repeated steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = len(run.attempts) if len(run.attempts) > 1 else 0
    lanes_in = min(0.30 + 0.17 * lanes, 3.0) if lanes else 0.0
    figure = Figure(figsize=(9.0, 6.4 + lanes_in), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot, which would look for a display
    heights = ([lanes_in] if lanes else []) + [3.0, 3.0]
    axes: list[Axes] = list(
        figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    )
    _title(figure, run)
    if lanes:
        _draw_attempts(axes[0], run)
    _draw_loss(axes[-2], run)
    _draw_quality(axes[-1], run)
    for axis in axes:
        _mark_losses(axis, run)
        axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(axes)
    _legends(figure, axes[-2:], run)
    _span_steps(axes[-1], run)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _title(figure: Figure, run: RunHistory) -> None:
    facts = [
        run.method.upper(),
        _count(len(run.attempts), "attempt"),
        _count(run.preemptions, "preemption"),
        f"{_count(run.lost_steps, 'step')} redone",
        "" if run.state == "done" else run.state,
    ]
    figure.suptitle(
        f"{run.run_id}\n", fontsize=13, fontweight="bold", x=0.012, ha="left"
    )  # the line break reserves room for the second line
    below = 1 - 0.34 / figure.get_figheight()  # the second line is 0.34 inches below the top
    figure.text(0.012, below, "  ·  ".join(filter(None, facts)), fontsize=10, color="0.35", va="top")


def _draw_attempts(axis: Axes, run: RunHistory) -> None:
    """Draw a lane for each attempt, from its first step to its last."""
    for lane, attempt in enumerate(run.attempts):
        axis.plot(
            [attempt.start, attempt.step], [lane, lane], color=TRAIN, linewidth=3.5, solid_capstyle="butt"
        )
        if lane:
            died = run.attempts[lane - 1].step
            axis.annotate(
                "", xy=(attempt.start, lane - 0.12), xytext=(died, lane - 1),
                arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 3, "shrinkB": 2},
            )  # fmt: skip
        lost = lane < len(run.attempts) - 1 or run.state not in ("done", "running")
        end = "X" if lost else ("s" if run.state == "done" else ">")
        axis.plot(attempt.step, lane, end, color=DEATH, markersize=6, clip_on=False, zorder=4)
    every = max(1, len(run.attempts) // 12)
    axis.set_yticks(
        range(0, len(run.attempts), every), [str(attempt.number) for attempt in run.attempts[::every]]
    )
    axis.set_ylim(len(run.attempts) - 0.4, -0.6)
    axis.set_ylabel("attempt")
    axis.tick_params(axis="y", length=0, labelsize=8)


def _draw_loss(axis: Axes, run: RunHistory) -> None:
    _curve(axis, values(run.steps, LOSS.key), label="train", test=False)
    _curve(axis, values(run.evals, LOSS.test_key), label="test", test=True)
    axis.set_ylabel("loss")


def _draw_quality(axis: Axes, run: RunHistory) -> None:
    """Draw reward accuracy, token accuracy or the learning rate: the first that the run has."""
    for metric in (REWARD_ACCURACY, TOKEN_ACCURACY):
        train, test = values(run.steps, metric.key), values(run.evals, metric.test_key)
        if train[0] or test[0]:
            _curve(axis, train, label="train", test=False)
            _curve(axis, test, label="test", test=True)
            axis.set_ylabel(metric.title)
            break
    else:
        _curve(axis, values(run.steps, LEARNING_RATE.key), label=LEARNING_RATE.unit, test=False)
        axis.set_ylabel(LEARNING_RATE.unit)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.set_xlabel("optimizer step")


def _curve(axis: Axes, points: tuple[list[int], list[float]], *, label: str, test: bool) -> None:
    if not points[0]:
        return
    style: dict[str, Any] = (
        {
            "color": TEST,
            "linewidth": 1.8,
            "marker": "o",
            "markersize": 5,
            "markeredgecolor": "white",
            "zorder": 3,
        }
        if test
        else {"color": TRAIN, "linewidth": 1.0, "alpha": 0.75, "marker": "." if len(points[0]) < 3 else ""}
    )
    axis.plot(*points, label=label, **style)


def _mark_losses(axis: Axes, run: RunHistory) -> None:
    """Mark where attempts were lost, where the next ones resumed, and which steps were repeated."""
    for attempt in run.attempts[:-1]:
        axis.axvline(attempt.step, color=DEATH, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.65, zorder=1)
    for span in run.redone:
        axis.axvspan(span.after, span.until, color="0.5", alpha=0.18, linewidth=0, zorder=0)
    bottom = axis.get_xaxis_transform()
    for attempt in run.restores:
        axis.plot(
            attempt.start, 0.0, "^", color="white", markeredgecolor=DEATH, markersize=7,
            transform=bottom, clip_on=False, zorder=5,
        )  # fmt: skip


def _legends(figure: Figure, panels: list[Axes], run: RunHistory) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for axis in panels:
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, loc="best")
    if len(run.attempts) < 2:
        return
    handles = [
        Line2D(
            [],
            [],
            color=DEATH,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            marker="X",
            alpha=0.8,
            label="attempt lost",
        ),
        Line2D([], [], color="white", marker="^", markeredgecolor=DEATH, markersize=7, label="restored from"),
        Patch(color="0.5", alpha=0.18, linewidth=0, label="steps redone"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _span_steps(axis: Axes, run: RunHistory) -> None:
    from matplotlib.ticker import MaxNLocator

    last = run.total_steps or max((attempt.step for attempt in run.attempts), default=0)
    axis.set_xlim(0, max(last, 1) * 1.01)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _ends(numbers: list[float]) -> Ends | None:
    return (numbers[0], numbers[-1]) if numbers else None


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"

"""Bars: where the paid time went, and memory as it was predicted and as it was."""

from __future__ import annotations

from launcher.report.svg import Markup, Scale, box, chart, line, plain, text, ticks
from launcher.runs.account import Memory
from launcher.runs.time_breakdown import NAMES, TimeBreakdown

KINDS = {
    "useful_s": "useful",
    "redone_s": "redone",
    "setup_s": "setup",
    "boot_s": "boot",
    "restore_s": "restore",
    "evaluation_s": "evaluation",
    "stall_s": "stall",
    "upload_s": "upload",
    "other_s": "rest",
}
"""CSS classes of the parts: a colour and a pattern each."""
CHARACTER_PX = 7.0


def time_bar(spent: TimeBreakdown, width: float) -> Markup:
    """The parts of paid time on one bar; those that are wide enough have their share on them."""
    paid_s = spent.paid_s or 1.0
    at, marks = 0.0, []
    for name, kind in KINDS.items():
        wide = width * getattr(spent, name) / paid_s
        if wide < 0.4:
            continue
        share = f"{getattr(spent, name) / paid_s:.0%}"
        marks.append(box(at, 0, wide, 34, f"part {kind}", f"{NAMES[name]}: {share}"))
        if wide > len(share) * CHARACTER_PX + 14:
            marks.append(text(share, at + wide / 2, 22, "on halo", anchor="middle"))
        at += wide
    told = ", ".join(
        f"{NAMES[name]} {getattr(spent, name) / paid_s:.0%}" for name in KINDS if getattr(spent, name)
    )
    return chart(width, 35, f"Shares of the paid time: {told}", *marks)


def memory_bar(memory: Memory, what: str, width: float) -> Markup:
    """What was predicted, term by term, above the measured peak, on a scale that ends at what is there."""
    predicted, measured = memory.predicted_gib or 0.0, memory.measured_gib or 0.0
    there = memory.there_gib or 0.0
    x = Scale(0, max(predicted, measured, min(there, 1.6 * max(predicted, measured))) or 1.0, 74, width - 40)
    marks: list[Markup] = [text("predicted", 0, 30, "unit"), text("measured", 0, 60, "unit")]
    at = 0.0
    for name, gib in memory.terms:
        wide = x(at + gib) - x(at)
        marks.append(box(x(at), 14, wide, 24, "term", f"{name}: {gib:.1f} GiB"))
        if wide > len(name) * CHARACTER_PX + 8:
            marks.append(text(name, x(at) + wide / 2, 30, "on", anchor="middle"))
        at += gib
    if predicted:
        marks.append(text(f"{predicted:.1f}", x(predicted) + 5, 30, "said halo"))
    if measured:
        marks.append(
            box(x(0), 44, x(measured) - x(0), 24, "part useful", f"measured peak: {measured:.1f} GiB")
        )
        marks.append(text(f"{measured:.1f}", x(measured) + 5, 60, "said halo"))
    else:
        marks.append(text("not measured", x(0) + 4, 60, "unit"))
    if 0 < there <= x.high:
        marks.append(line(x(there), 8, x(there), 74, "end"))
    scale = ticks(0, x.high, 6 if width > 600 else 3)
    marks += [text(plain(tick, scale), x(tick), 91, "tick", anchor="middle") for tick in scale]
    marks += [line(x(0), 75, x.end, 75, "axis"), text("GiB", x.end + 12, 91, "unit")]
    said = f"{what}: predicted {predicted:.1f} GiB, measured {measured:.1f} GiB, there are {there:.1f} GiB"
    return chart(width, 98, said, *marks)

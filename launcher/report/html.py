"""The report of a run, and of two runs side by side, as one HTML file that needs no other file.

The file has no scripts, and fetches nothing. Its style is `page.css`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files

from launcher.render import duration
from launcher.report import bars, curves, tables
from launcher.report.svg import Markup, joined, tag
from launcher.report.tables import ReportTable
from launcher.runs.account import Account
from launcher.runs.run import RunHistory
from launcher.runs.time_breakdown import NAMES

WIDE_PX, NARROW_PX = 940.0, 340.0
"""Widths of pictures: the full width of a page, and a phone of 360 pixels."""
LONGEST_WORD = 15
"""Letters: a column's name with a longer word, such as a run's name, may be broken anywhere."""
CURVES_NOTE = (
    "Bold: running mean over a fortieth of the steps. Dashed vertical line: an attempt ended, with its number and how."
    " Hatched: steps that were taken again. Dotted: the curve of the steps that were lost."
)
PATTERNS = Markup(
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true" focusable="false"><defs>'
    '<pattern id="p-redone" width="7" height="7" patternUnits="userSpaceOnUse"><rect class="pb-red" width="7"'
    ' height="7"/><path class="pl" d="M-1 8L8 -1M-1 1L1 -1M6 8L8 6"/></pattern>'
    '<pattern id="p-span" width="6" height="6" patternUnits="userSpaceOnUse"><path class="pl" style="opacity:.22"'
    ' d="M-1 7L7 -1M-1 1L1 -1M5 7L7 5"/></pattern>'
    '<pattern id="p-setup" width="6" height="6" patternUnits="userSpaceOnUse"><rect class="pb-plain" width="6"'
    ' height="6"/><circle class="pd" cx="1.5" cy="1.5" r="1"/><circle class="pd" cx="4.5" cy="4.5" r="1"/></pattern>'
    '<pattern id="p-boot" width="8" height="6" patternUnits="userSpaceOnUse"><rect class="pb-plain" width="8"'
    ' height="6"/><path class="pl" d="M0 5L4 1L8 5"/></pattern>'
    '<pattern id="p-restore" width="5" height="5" patternUnits="userSpaceOnUse"><rect class="pb-plain" width="5"'
    ' height="5"/><path class="pl" d="M0 2.5H5"/></pattern>'
    '<pattern id="p-evaluation" width="5" height="5" patternUnits="userSpaceOnUse"><rect class="pb-plain" width="5"'
    ' height="5"/><path class="pl" d="M2.5 0V5"/></pattern>'
    '<pattern id="p-stall" width="6" height="6" patternUnits="userSpaceOnUse"><rect class="pb-plain" width="6"'
    ' height="6"/><path class="pl" d="M0 3H6M3 0V6"/></pattern>'
    '<pattern id="p-upload" width="7" height="7" patternUnits="userSpaceOnUse"><rect class="pb-plain" width="7"'
    ' height="7"/><path class="pl" d="M-1 -1L8 8M-1 6L1 8M6 -1L8 1"/></pattern>'
    "</defs></svg>"
)


def run_page(run: RunHistory, account: Account, *, made: str) -> str:
    """Return the page of one run; `made` is the time of the report as text."""
    drawn = curves.panels(run)
    sections = [
        tag("section", _tiles(tables.figures(account)), aria_label="Key figures"),
        _section("Curves", *map(_panel, drawn), tag("p", CURVES_NOTE, class_="muted")) if drawn else None,
        _timeline(account) if account.attempts else None,
        _section(
            "Dollars and hours",
            _table(tables.attempts(account), sums=True, cards=True),
            _facts(tables.other_facts(account)),
        ),
        _spent(account),
        _plan_comparison(account),
        _memory(account),
    ]
    return _page(f"{run.run_id}: report", _head(account, made), sections)


def comparison_page(
    runs: tuple[RunHistory, RunHistory], accounts: tuple[Account, Account], *, made: str
) -> str:
    """Return the page of two runs side by side, called A and B."""
    names = [f"{letter}: {one.run}" for letter, one in zip("AB", accounts, strict=True)]
    lines = [tag("p", f"{name} · {one.uri}", class_="sub") for name, one in zip(names, accounts, strict=True)]
    head = joined((tag("h1", "Two runs compared"), *lines, tag("p", made, class_="sub")))
    shares = [
        joined((tag("h3", name), _picture(partial(bars.time_bar, one.hours))))
        for name, one in zip(names, accounts, strict=True)
    ]
    # Short names in the curves, because a run's name may be longer than the margin; the legend explains them.
    drawn = curves.comparison_panels(runs, "AB")
    legend = tag("p", f"Solid: {names[0]}. Dashed: {names[1]}. Dots: evaluations.", class_="muted")
    sections = [
        _section("Facts", _table(tables.comparison(accounts))),
        _section("Curves", *map(_panel, drawn), legend) if drawn else None,
        _section(
            "Where the paid time went",
            *shares,
            _key((kind, NAMES[name]) for name, kind in bars.KINDS.items()),
        ),
    ]
    for name, one in zip(names, accounts, strict=True):
        sections.append(_timeline(one, title=f"{name}: when and where") if one.attempts else None)
        sections.append(
            _section(f"{name}: dollars and hours", _table(tables.attempts(one), sums=True, cards=True))
        )
    return _page(f"{accounts[0].run} and {accounts[1].run}", head, sections)


# Sections


def _head(account: Account, made: str) -> Markup:
    shapes = ", ".join(dict.fromkeys(one.shape for one in account.attempts if one.shape))
    facts = " · ".join(filter(None, (account.method.upper(), account.recipe, shapes, made)))
    title = tag("h1", account.run, tag("span", account.state, class_="state"))
    return joined((title, tag("p", facts, class_="sub"), tag("p", account.uri, class_="sub")))


def _panel(panel: curves.Panel) -> Markup:
    def draw(width: float) -> Markup:
        return curves.draw(panel, width, 300 if width == WIDE_PX else 240)

    return joined((tag("h3", panel.title), _picture(draw)))


def _timeline(account: Account, title: str = "When and where") -> Markup:
    kinds = (
        ("boot", NAMES["boot_s"]),
        ("setup", "set-up and restore"),
        ("useful", "useful steps"),
        ("redone", "steps lost, redone later"),
        ("rest", "last upload, export, other"),
    )
    waited = (
        f"Dotted: {duration(account.provisioning_s)} in all without a machine."
        if account.provisioning_s
        else None
    )
    return _section(title, _picture(partial(bars.timeline, account), waited), _key(kinds))


def _spent(account: Account) -> Markup | None:
    if not account.attempts:
        return None
    bar = _picture(partial(bars.time_bar, account.hours))
    swatches = tuple(bars.KINDS.values())
    return _section(
        "Where the paid time went", bar, _table(tables.time_parts(account), sums=True, swatches=swatches)
    )


def _plan_comparison(account: Account) -> Markup | None:
    rows = tables.plan_comparison(account)
    return _section("Predictions of the plan", _table(rows)) if rows else None


def _memory(account: Account) -> Markup | None:
    """Return GPU and host memory of the attempts that measured the highest peaks."""
    shown = []
    for what, memories in (
        ("GPU", [one.gpu for one in account.attempts]),
        ("Host", [one.host for one in account.attempts]),
    ):
        known = [memory for memory in memories if memory.predicted_gib or memory.measured_gib]
        if not known:
            continue
        highest = max(known, key=lambda memory: memory.measured_gib or 0.0)
        capacity = f", of {tables.gib(highest.there_gib)} GiB" if highest.there_gib else ""
        picture = _picture(partial(bars.memory_bar, highest, what))
        shown += [tag("h3", f"{what}, peak{capacity}"), picture]
        if highest.terms:
            terms = ", ".join(f"{name} {tables.gib(gib)}" for name, gib in highest.terms)
            shown.append(tag("p", f"Predicted, in GiB: {terms}.", class_="muted"))
    return _section("Memory: the fit and what was measured", *shown) if shown else None


# Elements


def _page(title: str, head: Markup, sections: Iterable[Markup | None]) -> str:
    style = files("launcher.report").joinpath("page.css").read_text()
    meta = joined((
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Markup(style)),
    ))  # fmt: skip
    main = tag("main", *(section for section in sections if section))
    body = joined((PATTERNS, tag("header", head), main, tag("footer", tag("p", tables.NOT_COUNTED))))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{meta}</head>\n<body>{body}</body>\n</html>\n'


def _section(title: str, *children: str | None) -> Markup:
    return tag("section", tag("h2", title), *children)


def _picture(draw: Callable[[float], Markup], caption: str | None = None) -> Markup:
    """Return a picture in two widths, of which the style shows one.

    A single picture that scales would have letters that are too small to read on a phone.
    """
    below = tag("figcaption", caption) if caption else None
    wide, narrow = tag("div", draw(WIDE_PX), class_="wide"), tag("div", draw(NARROW_PX), class_="narrow")
    return tag("figure", wide, narrow, below)


def _table(
    rows: ReportTable, *, sums: bool = False, swatches: Sequence[str] = (), cards: bool = False
) -> Markup:
    """Return a table.

    Args:
        rows: the texts; the first column names the row.
        sums: whether the last row is the sum of the others.
        swatches: CSS classes of the samples in the first column of the first rows.
        cards: whether the rows become cards on a phone, for a table that is too wide for one. The style then sets
            `display`, which would hide from screen readers that this is a table; the roles tell them.
    """
    # Cells carry their column's name, because the header row is hidden where rows become cards.
    names = [name.removeprefix(">") for name in rows.columns]
    kinds = ["n" if name.startswith(">") else None for name in rows.columns]
    head = [
        tag(
            "th",
            name,
            scope="col",
            class_=" ".join(filter(None, (kind, _long_class(name)))) or None,
            role="columnheader",
        )
        for name, kind in zip(names, kinds, strict=True)
    ]
    body = []
    for nth, row in enumerate(rows.rows):
        mark = _swatch(swatches[nth]) if nth < len(swatches) else None
        first = tag("th", mark, row[0], scope="row", role="rowheader", data_label=names[0])
        cells = [
            tag("td", cell, class_=kind, role="cell", data_label=name)
            for cell, kind, name in zip(row[1:], kinds[1:], names[1:], strict=True)
        ]
        last = sums and nth == len(rows.rows) - 1
        body.append(tag("tr", first, *cells, role="row", class_="sum" if last else None))
    return tag(
        "table",
        tag("caption", rows.caption),
        tag("thead", tag("tr", *head, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        role="table",
        class_="cards" if cards else None,
    )


def _facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    return tag("dl", *(joined((tag("dt", name), tag("dd", value))) for name, value in pairs), class_="beside")


def _tiles(figures: Iterable[tuple[str, str, str]]) -> Markup:
    """Return the most important numbers as tiles."""
    tiles = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", tag("div", value, class_="value"), tag("div", note, class_="word")),
        )
        for name, value, note in figures
    ]
    return tag("dl", *tiles, class_="figures")


def _key(entries: Iterable[tuple[str, str]]) -> Markup:
    """Return the meaning of patterns: CSS class and text of each."""
    return tag("ul", *(tag("li", _swatch(kind), words) for kind, words in entries), class_="key")


def _long_class(name: str) -> str | None:
    return "long" if max(map(len, name.split()), default=0) > LONGEST_WORD else None


def _swatch(kind: str) -> Markup:
    rect = tag("rect", width=22, height=13, class_=f"part {kind}")
    return tag("svg", rect, class_="swatch", viewBox="0 0 22 13", aria_hidden="true")

"""What all pages are made of: head, tables, pictures for wide and for narrow screens, patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files

from launcher.report.svg import Markup, joined, tag
from launcher.report.tables import ReportTable

WIDE_PX, NARROW_PX = 940.0, 340.0
"""Of pictures: of a page's full width, and of a phone of 360 pixels."""
LONGEST_WORD = 15
"""Letters of a column's name that are not broken in two."""
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


def page(title: str, head: Markup, sections: Iterable[Markup], foot: str) -> str:
    """One file that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""
    style = files("launcher.report").joinpath("page.css").read_text()
    meta = joined((
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Markup(style)),
    ))  # fmt: skip
    body = joined((PATTERNS, tag("header", head), tag("main", *sections), tag("footer", tag("p", foot))))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{meta}</head>\n<body>{body}</body>\n</html>\n'


def section(title: str, *children: str | None) -> Markup:
    return tag("section", tag("h2", title), *children)


def picture(draw: Callable[[float], Markup], caption: str | None = None) -> Markup:
    """Drawn twice, since letters of a picture that shrinks cannot be read; the page shows one of them."""
    below = tag("figcaption", caption) if caption else None
    wide, narrow = tag("div", draw(WIDE_PX), class_="wide"), tag("div", draw(NARROW_PX), class_="narrow")
    return tag("figure", wide, narrow, below)


def table(
    rows: ReportTable, *, sums: bool = False, swatches: Sequence[str] = (), cards: bool = False
) -> Markup:
    """A table whose rows become cards on a phone, with `cards`.

    Args:
        rows: the words; the first column names the row.
        sums: the last row is the sum of the others.
        swatches: kinds of parts, for the first column of the first rows.
        cards: it is too wide for a phone. The roles say what it is, which `display` would have it forget.
    """
    names = [name.removeprefix(">") for name in rows.columns]
    kinds = ["n" if name.startswith(">") else None for name in rows.columns]
    head = [
        tag(
            "th",
            name,
            scope="col",
            class_=" ".join(filter(None, (kind, _long(name)))) or None,
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


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    return tag("dl", *(joined((tag("dt", name), tag("dd", value))) for name, value in pairs), class_="beside")


def tiles(figures: Iterable[tuple[str, str, str]]) -> Markup:
    """The few numbers that matter most."""
    each = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", tag("div", value, class_="value"), tag("div", word, class_="word")),
        )
        for name, value, word in figures
    ]
    return tag("dl", *each, class_="figures")


def key(*entries: tuple[str, str]) -> Markup:
    """What patterns mean."""
    return tag("ul", *(tag("li", _swatch(kind), words) for kind, words in entries), class_="key")


def _long(name: str) -> str | None:
    """Of a column whose name may be broken anywhere: a run's, which is no word."""
    return "long" if max(map(len, name.split()), default=0) > LONGEST_WORD else None


def _swatch(kind: str) -> Markup:
    rect = tag("rect", width=22, height=13, class_=f"part {kind}")
    return tag("svg", rect, class_="swatch", viewBox="0 0 22 13", aria_hidden="true")

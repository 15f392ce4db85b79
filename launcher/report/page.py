"""The report of a run, and of two beside each other, as one HTML file."""

from __future__ import annotations

from functools import partial

from launcher.render import duration
from launcher.report import bars, curves, tables, timeline
from launcher.report.html import WIDE_PX, facts, key, page, picture, section, table, tiles
from launcher.report.series import Panel, compared, panels
from launcher.report.svg import Markup, joined, tag
from launcher.runs.account import Account
from launcher.runs.run import RunHistory
from launcher.runs.time_breakdown import NAMES

CURVES = (
    "Bold: mean over a fortieth of the steps. Dashed line across: an attempt ended there, with its number and how."
    " Hatched: steps that were taken again; dotted: what those had that were lost."
)


def of_run(run: RunHistory, account: Account, *, made: str) -> str:
    """The page of one run; `made` says when."""
    drawn = panels(run)
    sections = [
        tag("section", tiles(tables.figures(account)), aria_label="Key figures"),
        section("Curves", *map(_panel, drawn), tag("p", CURVES, class_="muted")) if drawn else None,
        _timeline(account) if account.attempts else None,
        section(
            "Dollars and hours",
            table(tables.attempts(account), sums=True, cards=True),
            facts(tables.beside(account)),
        ),
        _spent(account),
        _promised(account),
        _memory(account),
    ]
    return page(
        f"{run.run_id}: report", _head(account, made), [each for each in sections if each], tables.NOT_COUNTED
    )


def of_two(runs: tuple[RunHistory, RunHistory], accounts: tuple[Account, Account], *, made: str) -> str:
    """Two runs beside each other, A and B."""
    names = [f"{letter}: {one.run}" for letter, one in zip("AB", accounts, strict=True)]
    told = [tag("p", f"{name} · {one.uri}", class_="sub") for name, one in zip(names, accounts, strict=True)]
    head = joined((tag("h1", "Two runs compared"), *told, tag("p", made, class_="sub")))
    shares = [
        joined((tag("h3", name), picture(partial(bars.time_bar, one.hours))))
        for name, one in zip(names, accounts, strict=True)
    ]
    drawn = compared(runs, "AB")
    legend = tag("p", f"Solid: {names[0]}. Dashed: {names[1]}. Dots: evaluations.", class_="muted")
    sections = [
        section("Facts", table(tables.compared(accounts))),
        section("Curves", *map(_panel, drawn), legend) if drawn else None,
        section("Where the paid time went", *shares, key(*((kind, name) for name, kind in _parts()))),
    ]
    for name, one in zip(names, accounts, strict=True):
        sections.append(_timeline(one, title=f"{name}: when and where") if one.attempts else None)
        sections.append(
            section(f"{name}: dollars and hours", table(tables.attempts(one), sums=True, cards=True))
        )
    title = f"{accounts[0].run} and {accounts[1].run}"
    return page(title, head, [each for each in sections if each], tables.NOT_COUNTED)


def _head(account: Account, made: str) -> Markup:
    shapes = ", ".join(dict.fromkeys(one.shape for one in account.attempts if one.shape))
    told = " · ".join(filter(None, (account.method.upper(), account.recipe, shapes, made)))
    title = tag("h1", account.run, tag("span", account.state, class_="state"))
    return joined((title, tag("p", told, class_="sub"), tag("p", account.uri, class_="sub")))


def _panel(panel: Panel) -> Markup:
    def draw(width: float) -> Markup:
        return curves.draw(panel, width, 300 if width == WIDE_PX else 240)

    return joined((tag("h3", panel.title), picture(draw)))


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
    return section(title, picture(partial(timeline.draw, account), waited), key(*kinds))


def _spent(account: Account) -> Markup | None:
    if not account.attempts:
        return None
    bar = picture(partial(bars.time_bar, account.hours))
    kinds = [kind for _, kind in _parts()]
    return section("Where the paid time went", bar, table(tables.spent(account), sums=True, swatches=kinds))


def _promised(account: Account) -> Markup | None:
    rows = tables.promised(account)
    return section("What plan promised", table(rows)) if rows else None


def _memory(account: Account) -> Markup | None:
    """Of the attempt whose peak was the highest."""
    shown = []
    for what, memories in (
        ("GPU", [one.gpu for one in account.attempts]),
        ("Host", [one.host for one in account.attempts]),
    ):
        known = [memory for memory in memories if memory.predicted_gib or memory.measured_gib]
        if known:
            highest = max(known, key=lambda memory: memory.measured_gib or 0.0)
            there = f"; there are {tables.gib(highest.there_gib)} GiB" if highest.there_gib else ""
            draw = partial(bars.memory_bar, highest, what)
            shown += [tag("h3", f"{what}, peak{there}"), picture(draw)]
            if highest.terms:
                terms = ", ".join(f"{name} {tables.gib(gib)}" for name, gib in highest.terms)
                shown.append(tag("p", f"Predicted, in GiB: {terms}.", class_="muted"))
    return section("Memory: the fit and what was measured", *shown) if shown else None


def _parts() -> list[tuple[str, str]]:
    return [(NAMES[name], kind) for name, kind in bars.KINDS.items()]

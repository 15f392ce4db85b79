"""The facts of an account as rows of text, for the terminal and for the HTML page."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from launcher.render import NOTHING, duration, size, usd
from launcher.runs.account import Account, AttemptAccount
from launcher.runs.time_breakdown import NAMES
from trainer.metrics import LOSS, REWARD_ACCURACY, TOKEN_ACCURACY

NOT_COUNTED = (
    "An attempt is counted from its claim to its last event. If SkyPilot rented the machine within the hour before the"
    " claim, it is counted from the machine's boot. The time from the last event to the machine's release is not counted."
)


class ReportTable(NamedTuple):
    """The texts of a table."""

    caption: str
    columns: tuple[str, ...]
    """A name that begins with `>` marks a column of numbers, which is aligned to the right."""
    rows: tuple[tuple[str, ...], ...]


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def gib(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def figures(account: Account) -> list[tuple[str, str, str]]:
    """Return the most important numbers: name, value and a note."""
    plan = account.plan or {}
    of = f"of {account.total_steps:,}" if account.total_steps else ""
    markets = (
        f"spot {usd(account.spot_usd)}, on demand {usd(account.on_demand_usd)}"
        if account.usd is not None
        else ""
    )
    planned = f"planned {usd(plan['usd'])}; " if plan.get("usd") is not None else ""
    hours = f"planned {duration(plan['hours'] * 3600)}; " if plan.get("hours") is not None else ""
    found = [
        (
            "dollars",
            usd(account.usd),
            planned + markets if account.usd is not None else "price unknown",
        ),
        ("time", duration(account.wall_s), f"{hours}{duration(account.hours.paid_s)} of it paid"),
        ("goodput", percent(account.goodput), "share of the paid time spent on useful steps"),
        ("steps", f"{account.step:,}", f"{of}; {account.lost_steps} lost and redone"),
        ("attempts", str(len(account.attempts)), ", ".join(one.how for one in account.attempts[-4:])),
    ]
    # Without evaluations, the training loss is the best number there is for the quality.
    if test_loss := LOSS.test_text(account.test):
        accuracy = REWARD_ACCURACY.test_text(account.test) or TOKEN_ACCURACY.test_text(account.test)
        found.append(("test loss", test_loss, f"accuracy {accuracy}" if accuracy else ""))
    elif account.loss is not None:
        found.append(("train loss", format(account.loss, LOSS.format), "of the last step"))
    return found


def attempts(account: Account) -> ReportTable:
    """Return hours and dollars of each attempt, and their sum."""
    rows = [_attempt(one) for one in account.attempts]
    every = (
        "all",
        "",
        "",
        "",
        duration(account.hours.paid_s),
        usd(account.usd),
        f"{account.step:,}",
        str(account.lost_steps),
    )
    columns = ("attempt", "where", "market", ">$/h", ">paid time", ">$", ">steps", ">lost", "end")
    return ReportTable(
        "Each attempt, from its machine's boot or its claim to its last event",
        columns,
        (*rows, (*every, account.state)),
    )


def _attempt(one: AttemptAccount) -> tuple[str, ...]:
    price = NOTHING if one.usd_per_h is None else f"{one.usd_per_h:.2f}"
    return (
        str(one.number),
        one.where,
        one.market or NOTHING,
        price,
        duration(one.hours.paid_s),
        usd(one.usd),
        f"{one.start_step:,} → {one.last_step:,}",
        str(one.lost_steps),
        one.how,
    )


def time_parts(account: Account) -> ReportTable:
    """Return what the paid time was spent on."""
    paid_s = account.hours.paid_s or 1.0
    rows = []
    for name, title in NAMES.items():
        seconds = getattr(account.hours, name)
        cost = sum(
            getattr(one.hours, name) / 3600 * one.usd_per_h for one in account.attempts if one.usd_per_h
        )
        dollars = usd(cost) if account.usd is not None else NOTHING
        rows.append((title, duration(seconds), f"{seconds / paid_s:.1%}", dollars))
    rows.append(("paid in all", duration(account.hours.paid_s), "", usd(account.usd)))
    return ReportTable(
        "Parts of the paid time, over all attempts", ("part", ">time", ">share", ">$"), tuple(rows)
    )


def other_facts(account: Account) -> list[tuple[str, str]]:
    """Return what is not a part of the paid time or overlaps it: provisioning, uploads, checkpoints, failures."""
    rate = f", {account.uploaded_bytes / account.upload_s / 1e6:,.0f} MB/s" if account.upload_s else ""
    ups = f"{duration(account.upload_s)} for {size(account.uploaded_bytes)}{rate}"
    failures = [
        (f"attempt {one.number}", one.message)
        for one in account.attempts
        if one.how == "failed" and one.message
    ]
    return [
        *failures,
        ("provisioning", f"{duration(account.provisioning_s)} between attempts, without a machine"),
        ("uploads", f"{ups}; most of it during training"),
        ("checkpoints", f"{account.commits} committed"),
    ]


def plan_comparison(account: Account) -> ReportTable | None:
    """Return the predictions of `plan` beside the measured values; None if the run has no plan."""
    plan = account.plan
    if not plan:
        return None
    step_s = [one.step_s for one in account.attempts if one.step_s]
    gpu = [one.gpu.measured_gib for one in account.attempts if one.gpu.measured_gib]
    host = [one.host.measured_gib for one in account.attempts if one.host.measured_gib]
    hours = account.wall_s / 3600
    facts = (
        ("hours in all", plan.get("hours"), hours, "{:.2f}"),
        ("dollars", plan.get("usd"), account.usd, "{:.2f}"),
        ("$/h of paid time", plan.get("usd_per_h"), account.usd / (account.hours.paid_s / 3600) if account.usd else None, "{:.2f}"),
        ("seconds per step", plan.get("step_s"), sum(step_s) / len(step_s) if step_s else None, "{:.2f}"),
        ("GiB per GPU", plan.get("gpu_gib"), max(gpu, default=None), "{:.1f}"),
        ("GiB per host", plan.get("host_gib"), max(host, default=None), "{:.1f}"),
    )  # fmt: skip
    rows = tuple(_against(name, form, then, now) for name, then, now, form in facts if then or now)
    unfinished = "" if account.state == "done" else f", so far: the run is {account.state}"
    return ReportTable(f"Planned and actual{unfinished}", ("", ">planned", ">actual", ">difference"), rows)


def _against(name: str, form: str, then: float | None, now: float | None) -> tuple[str, ...]:
    change = f"{now / then - 1:+.0%}" if then and now else NOTHING
    return name, form.format(then) if then else NOTHING, form.format(now) if now else NOTHING, change


def comparison(accounts: tuple[Account, Account]) -> ReportTable:
    """Return the facts of two runs side by side, and by how much the second differs."""
    reads: list[tuple[str, Callable[[Account], float | None], Callable[[float | None], str]]] = [
        ("steps", lambda one: one.step, _count),
        ("attempts", lambda one: len(one.attempts), _count),
        ("dollars", lambda one: one.usd, usd),
        ("dollars, spot", lambda one: one.spot_usd if one.usd is not None else None, usd),
        ("dollars, on demand", lambda one: one.on_demand_usd if one.usd is not None else None, usd),
        ("time", lambda one: one.wall_s, _time),
        ("paid time", lambda one: one.hours.paid_s, _time),
        ("without a machine", lambda one: one.provisioning_s, _time),
        ("goodput", lambda one: one.goodput, percent),
        ("lost steps", lambda one: one.lost_steps, _count),
        *((title, attrgetter(f"hours.{name}"), _time) for name, title in NAMES.items()),
        ("train loss", lambda one: one.loss, _loss),
        ("test loss", lambda one: one.test.get(LOSS.test_key), _loss),
        ("test reward accuracy", lambda one: one.test.get(REWARD_ACCURACY.test_key), _loss),
    ]
    first, second = accounts
    rows = [("state", first.state, second.state, "")]
    for name, read, form in reads:
        mine, theirs = read(first), read(second)
        if mine is not None or theirs is not None:
            change = f"{theirs / mine - 1:+.0%}" if mine and theirs is not None else ""
            change = "same" if mine == theirs else change
            rows.append((name, form(mine), form(theirs), change))
    return ReportTable("Side by side", ("", f">A: {first.run}", f">B: {second.run}", ">B to A"), tuple(rows))


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _time(seconds: float | None) -> str:
    return NOTHING if seconds is None else duration(seconds)


def _loss(value: float | None) -> str:
    return NOTHING if value is None else format(value, LOSS.format)

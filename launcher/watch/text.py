"""What matters of a run at one moment, in words."""

from __future__ import annotations

from datetime import datetime

from launcher.render import duration, usd
from launcher.report.tables import gib
from launcher.runs.account import how
from launcher.watch.state import RunSnapshot
from trainer.events import of_kind
from trainer.metrics import LOSS, REWARD_ACCURACY


def pairs(seen: RunSnapshot) -> list[tuple[str, str]]:
    """The facts of the moment, name and value."""
    one, run = seen.account, seen.run
    if not run.attempts:
        return [("state", f"{seen.state}: nothing was heard of it yet")]
    newest = one.attempts[-1]
    last = run.steps[-1] if run.steps else {}
    price = f"{newest.usd_per_h:.2f} $/h" if newest.usd_per_h is not None else "no known price"
    speed = [
        f"{newest.step_s:.3g} s a step" if newest.step_s else "",
        f"{newest.tokens_per_s:,.0f} tokens/s" if newest.tokens_per_s else "",
    ]
    metrics = [
        f"loss {loss}" if (loss := LOSS.text(last)) else "",
        f"test loss {loss}" if (loss := LOSS.test_text(one.test)) else "",
        f"test accuracy {accuracy}" if (accuracy := REWARD_ACCURACY.test_text(one.test)) else "",
    ]
    return [
        ("node", ", ".join(filter(None, (newest.where, newest.market, price, newest.fit)))),
        ("dollars", dollars(seen)),
        ("last commit", commit(seen)),
        ("pace", ", ".join(filter(None, speed)) or "no step yet"),
        ("now", ", ".join(filter(None, metrics)) or "no step yet"),
        *([("GPU memory", f"{gib(newest.gpu.measured_gib)} GiB at most, {gib(newest.gpu.predicted_gib)} predicted, {gib(newest.gpu.there_gib)} there")] if newest.gpu.measured_gib else []),
    ]  # fmt: skip


def dollars(seen: RunSnapshot) -> str:
    """So far, of the budget, and what the rest will take at this pace."""
    one = seen.account
    if one.usd is None:
        return "nobody knows a price"
    budget = (one.limits or {}).get("budget_usd")
    planned = (one.plan or {}).get("usd")
    words = [f"{usd(one.usd)} so far"]
    if budget:
        words.append(f"{one.usd / budget:.0%} of the budget of {usd(budget)}")
    if planned:
        words.append(f"{usd(planned)} planned")
    newest = one.attempts[-1]
    if (left := seen.left_s) is not None and newest.usd_per_h is not None:
        words.append(f"about {usd(one.usd + left / 3600 * newest.usd_per_h)} at the end")
    return ", ".join(words)


def commit(seen: RunSnapshot) -> str:
    """The newest, and how old it is: what a loss of the machine would cost now."""
    run = seen.run
    if not run.commits:
        return "none yet"
    told = [event for event in of_kind(run.events, "committed") if event["step"] == run.commits[-1]]
    age = f", {duration(seen.now - datetime.fromisoformat(told[-1]['time']).timestamp())} ago" if told else ""
    return (
        f"step {run.commits[-1]:,}{age}, {run.step - run.commits[-1]:,} steps since"
        if run.state != "done"
        else f"step {run.commits[-1]:,}"
    )


def line(seen: RunSnapshot) -> str:
    """All of it in one line, for a log."""
    run, one = seen.run, seen.account
    if not run.attempts:
        return f"{seen.state}: nothing was heard of it yet"
    last = run.steps[-1] if run.steps else {}
    words = [
        seen.state,
        f"attempt {run.attempts[-1].number} {how(run, run.attempts[-1])}",
        f"step {run.step} of {run.total_steps}" if run.total_steps else "",
        f"loss {loss}" if (loss := LOSS.text(last)) else "",
        f"committed {run.commits[-1]}" if run.commits else "",
        f"{usd(one.usd)}" if one.usd is not None else "",
        f"{duration(seen.left_s)} left" if seen.left_s else "",
    ]
    return "  ".join(filter(None, words))

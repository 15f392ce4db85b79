"""A run's limits on the laptop: which limits a submission gets, and when another attempt would be useless."""

from __future__ import annotations

from datetime import datetime

from launcher.runs.run import RunHistory
from launcher.settings import Settings
from trainer.accounting import Limits, exhausted_limit
from trainer.errors import UserError
from trainer.events import of_kind

PRICE_HINT = (
    "leave out `--budget`, or give the price of an hour: `usd_per_h` in the settings, or $AEOLUS_USD_PER_H"
)


def limits_for(
    site: Settings, *, budget_usd: float | None, deadline_h: float | None, owned: str | None
) -> Limits:
    """Return the limits of a submission: its options, else the budget of the settings.

    A budget needs a price. Rented machines have a catalog's price; owned ones have a price only if the settings give
    it. Without a price, the budget of the settings does not apply.

    Args:
        site: the settings.
        budget_usd: the option `--budget`.
        deadline_h: the option `--deadline`.
        owned: the user's name for machines that are not rented, such as `this machine`; None for rented ones.

    Raises:
        UserError: a budget was asked for on machines without a price.
    """
    if owned is not None and site.usd_per_h is None:
        if budget_usd:
            raise UserError(f"no price is known for {owned}, so a budget cannot be kept", hint=PRICE_HINT)
        return Limits(deadline_h=deadline_h)
    return Limits(budget_usd=budget_usd or site.budget_usd, deadline_h=deadline_h)


def current_limits(run: RunHistory) -> Limits:
    """Return the limits that the run's newest attempt keeps to, from its claim."""
    claims = of_kind(run.attempts[-1].events, "claimed") if run.attempts else []
    return Limits.model_validate((claims[-1].get("limits") if claims else None) or {})


def refuse_used_up(run: RunHistory, limits: Limits, *, now: datetime) -> None:
    """Refuse another attempt that would stop right after its start, but would be paid for.

    Raises:
        UserError: a limit is used up. The message names the limit, the hint how to continue.
    """
    exhausted = exhausted_limit([attempt.events for attempt in run.attempts], limits, now)
    if exhausted is None:
        return
    newest = f"step {max(run.commits)}" if run.commits else "none"
    raise UserError(
        f"run {run.run_id} has used up its {exhausted.what}: {exhausted}, in {len(run.attempts)} attempt"
        f"{'s' * (len(run.attempts) != 1)}; its newest commit is {newest}",
        hint=f"`launcher submit --resume {run.run_id} --{exhausted.what} N` with a higher N continues from there",
    )


def changed_limits_note(run: RunHistory, limits: Limits) -> str | None:
    """Return a note for a user who asks for other limits while the run is running; None if the limits are equal."""
    if not run.attempts or current_limits(run) == limits:
        return None
    return (
        "the run is running, and keeps the limits that it was started with; to change them,"
        f" `launcher cancel {run.run_id}` and repeat this command"
    )

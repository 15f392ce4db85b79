"""UltraFeedback (arXiv:2310.01377) as pairs: of four rated answers to a question, the best and a worse one.

Argilla describes its own, https://huggingface.co/datasets/argilla/ultrafeedback-binarized-preferences: the mean
of an answer's ratings instead of its `overall_score`, the best mean chosen, a random one of the lower means
rejected, rows without a lower one left out (63,619 of 63,967 stay). So does this. What theirs does not say, and
ours decides: the random draw is by the seed and the question, so it is the same on every machine and whatever
other rows are there; of several best answers the first is chosen; a rating that is no number, such as `N/A`, does
not count in the mean, as in UltraFeedback's own https://github.com/OpenBMB/UltraFeedback,
src/data_annotation/fix_overall_score_issue.py. The columns are those of Argilla's data, but for `source`.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from trainer.errors import DataError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
HIGHEST_RATING = 5.0
NEEDED = ("instruction", "completions")

ALIKE = "all answers rated alike"
UNRATED = "fewer than two rated answers"


class Rated(NamedTuple):
    mean: float | None
    """0 to 5; None if not one rating is a number."""
    unreadable: int
    """Ratings that do not count."""


class Pick(NamedTuple):
    """Which of a row's answers."""

    row: int
    chosen: int
    rejected: int


class Pairs(Sequence[Row]):
    """The pairs, each made when asked for: the rows may stay on disk."""

    def __init__(self, rows: Sequence[Row], picks: Sequence[Pick]) -> None:
        self._rows = rows
        self._picks = picks

    def __len__(self) -> int:
        return len(self._picks)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Row | Pairs:
        if isinstance(index, slice):
            return Pairs(self._rows, self._picks[index])
        pick = self._picks[index]
        return _pair(self._rows[pick.row], pick)

    def __iter__(self) -> Iterator[Row]:
        return (_pair(self._rows[pick.row], pick) for pick in self._picks)


def binarise(rows: Sequence[Row], *, name: str, seed: int) -> Pairs:
    """A pair of each row that has one, in the rows' order; how many have none is logged.

    Raises:
        DataError: the rows are not UltraFeedback's, or there is not one pair.
    """
    if missing := [column for column in NEEDED if column not in rows[0]]:
        raise DataError(
            f"{name} has no column {missing[0]}, which `binarise` needs; it has {', '.join(sorted(rows[0]))}",
            hint="`binarise` is for the form of openbmb/UltraFeedback",
        )
    picks: list[Pick] = []
    left_out: Counter[str] = Counter()
    unreadable = 0
    for number, row in enumerate(rows):
        rated = [rate(completion) for completion in row["completions"] or ()]
        unreadable += sum(each.unreadable for each in rated)
        picked = pick([each.mean for each in rated], draw=f"{seed}/{row['instruction']}")
        if isinstance(picked, str):
            left_out[picked] += 1
        else:
            picks.append(Pick(number, *picked))
    _report(name, picks, left_out, unreadable)
    return Pairs(rows, picks)


def pick(means: Sequence[float | None], *, draw: str) -> tuple[int, int] | str:
    """The places of the chosen and of the rejected answer, or why there is no such pair.

    `draw` seeds the choice among the answers that are worse than the best.
    """
    rated = {place: mean for place, mean in enumerate(means) if mean is not None}
    if len(rated) < 2:
        return UNRATED
    best = max(rated, key=lambda place: rated[place])  # of several, the first
    worse = [place for place, mean in rated.items() if mean < rated[best]]
    return (best, random.Random(draw).choice(worse)) if worse else ALIKE


def rate(completion: Row) -> Rated:
    """The mean of an answer's ratings."""
    annotations = completion.get("annotations") or {}
    ratings = [_rating(annotations.get(aspect)) for aspect in ASPECTS]
    counted = [rating for rating in ratings if rating is not None]
    return Rated(sum(counted) / len(counted) if counted else None, len(ratings) - len(counted))


def _rating(annotation: Any) -> float | None:
    try:
        rating = float(annotation["Rating"])
    except (KeyError, TypeError, ValueError):
        return None
    return rating if 0 <= rating <= HIGHEST_RATING else None


def _pair(row: Row, pick: Pick) -> Row:
    chosen, rejected = row["completions"][pick.chosen], row["completions"][pick.rejected]
    return {
        "instruction": row["instruction"],
        "chosen_response": chosen.get("response"),
        "rejected_response": rejected.get("response"),
        "chosen_avg_rating": rate(chosen).mean,
        "rejected_avg_rating": rate(rejected).mean,
        "chosen_model": chosen.get("model"),
    }


def _report(name: str, picks: Sequence[Pick], left_out: Counter[str], unreadable: int) -> None:
    rows = len(picks) + left_out.total()
    why = ", ".join(f"{number} x {reason}" for reason, number in left_out.most_common()) or "no row"
    if not picks:
        raise DataError(f"{name}: not one of {rows} rows makes a pair: {why}")
    log.info(
        "%s: %d pairs of %d rows by the mean of the ratings; left out: %s; %d ratings are no number from 0 to %d "
        "and do not count",
        name, len(picks), rows, why, unreadable, HIGHEST_RATING,
    )  # fmt: skip

"""Makes preference pairs from UltraFeedback (arXiv:2310.01377): the best of four rated answers, and a worse one.

The method is the one that Argilla describes for its data set,
https://huggingface.co/datasets/argilla/ultrafeedback-binarized-preferences:
- An answer's score is the mean of its ratings, not its `overall_score`.
- The answer with the best mean is chosen. A random answer with a lower mean is rejected.
- Rows without an answer with a lower mean are left out (63,619 of 63,967 rows stay).

Three points are not described there, and are decided here:
- The random choice depends on the seed and the question. So it is the same on every machine, and does not depend on
  other rows.
- If several answers are best, the first one is chosen.
- A rating that is not a number, such as `N/A`, does not count in the mean, as in UltraFeedback's own
  https://github.com/OpenBMB/UltraFeedback, src/data_annotation/fix_overall_score_issue.py.

The columns are those of Argilla's data, without `source`.
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
    """The mean rating of an answer."""

    mean: float | None
    """0 to 5; None if no rating is a number."""
    unreadable: int
    """The number of ratings that are ignored, because they are not numbers from 0 to 5."""


class Pick(NamedTuple):
    """The numbers of a row and of its chosen and rejected answers."""

    row: int
    chosen: int
    rejected: int


class Pairs(Sequence[Row]):
    """The pairs. Each is made on access, so the rows may stay on disk."""

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
    """Return a pair for each row that has one, in the order of the rows; log the number of rows without one.

    Raises:
        DataError: the rows have other columns than UltraFeedback, or no row has a pair.
    """
    if missing := [column for column in NEEDED if column not in rows[0]]:
        raise DataError(
            f"{name} has no column {missing[0]}, which `binarise` needs; it has {', '.join(sorted(rows[0]))}",
            hint="`binarise` is for data with the columns of openbmb/UltraFeedback",
        )
    picks: list[Pick] = []
    left_out: Counter[str] = Counter()
    unreadable = 0
    for number, row in enumerate(rows):
        rated = [rate(completion) for completion in row["completions"] or ()]
        unreadable += sum(answer.unreadable for answer in rated)
        picked = pick([answer.mean for answer in rated], draw=f"{seed}/{row['instruction']}")
        if isinstance(picked, str):
            left_out[picked] += 1
        else:
            picks.append(Pick(number, *picked))
    _report(name, picks, left_out, unreadable)
    return Pairs(rows, picks)


def pick(means: Sequence[float | None], *, draw: str) -> tuple[int, int] | str:
    """Return the positions of the chosen and the rejected answer, or the reason why there is no pair.

    `draw` seeds the choice among the answers that are worse than the best one.
    """
    rated = {place: mean for place, mean in enumerate(means) if mean is not None}
    if len(rated) < 2:
        return UNRATED
    best = max(rated, key=lambda place: rated[place])  # the first one, if there are several
    worse = [place for place, mean in rated.items() if mean < rated[best]]
    return (best, random.Random(draw).choice(worse)) if worse else ALIKE


def rate(completion: Row) -> Rated:
    """Return the mean of an answer's ratings."""
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
        raise DataError(f"{name}: none of {rows} rows has a pair: {why}")
    log.info(
        "%s: built %d pairs from %d rows, by the mean rating of each answer; rows without a pair: %s; "
        "ignored %d ratings that are not numbers from 0 to %d",
        name, len(picks), rows, why, unreadable, HIGHEST_RATING,
    )  # fmt: skip

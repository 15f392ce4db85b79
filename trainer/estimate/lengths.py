"""How long padded rows are: the longest of a few that met by chance, or of those that were dealt by length."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

LONGER_HALF = 0.15
"""Deviations by which the longer half of a pair exceeds the mean of both, measured: of 199 pairs of LLaMA-Factory's
dpo_en_demo, bytes / 4.2, 0.13 to 0.21 (cut to 2048, 1024 and 512). Halves that knew nothing of each other would have 0.56;
the prompt is the same in both."""
SHORTEST = 0.05
"""Cube root of the shortest row, as a part of the mean: there are no empty ones."""
ROUNDS = 50
"""Halvings: to the last bits of a length."""


def padded(mean: float, spread: float, count: int, limit: int) -> int:
    """The longest of `count` sequences, expected.

    The maximum of normal values lies some deviations above their mean: the quantile (n - 3/8) / (n + 1/4)
    (Blom 1958, https://doi.org/10.1093/biomet/46.3-4.510, a review). Truncation caps it.
    """
    above = NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0
    return max(1, min(limit, math.ceil(mean * (1 + spread * above))))


def longer_half(mean: float, spread: float, limit: int) -> float:
    """Mean of the longer halves of pairs, tokens."""
    return min(float(limit), mean * (1 + LONGER_HALF * spread))


@lru_cache(maxsize=64)
def by_length(mean: float, spread: float, count: int, limit: int) -> tuple[float, ...]:
    """Lengths of `count` rows that lie in order, the longest first, expected: their mean is `mean`.

    Lengths are above nothing and lean to the right: a gamma distribution of that spread, its quantiles by Wilson and
    Hilferty (1931, https://doi.org/10.1073/pnas.17.12.684), at the places of Blom, as above. All are stretched until their
    mean, with what is beyond the limit cut to it, is the one that is given.
    """
    if mean >= limit:
        return (float(limit),) * count
    places = ((count - at - 0.375) / (count + 0.25) for at in range(count))
    quantiles = [_gamma(NormalDist().inv_cdf(place), spread) for place in places]
    low, high = 0.0, limit / quantiles[-1]
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        short = sum(min(limit, middle * each) for each in quantiles) < mean * count
        low, high = (middle, high) if short else (low, middle)
    return tuple(min(float(limit), high * each) for each in quantiles)


def _gamma(deviations: float, spread: float) -> float:
    """Of mean 1: the value that lies as far in the distribution as so many deviations do in the normal one."""
    square = spread**2 / 9
    return max(SHORTEST, 1 - square + deviations * math.sqrt(square)) ** 3

"""Whether an attempt pays for its machine's boot."""

from __future__ import annotations

from datetime import UTC, datetime

import psutil
import pytest

from tests.unit.test_price import environ
from trainer.events import Event
from trainer.options import USD_PER_H
from trainer.supervisor.price import paid_boot_time

BOOT_S = 1_790_000_000.0
"""Unix time."""
GCP = environ("GCP", "us-central1")


@pytest.fixture(autouse=True)
def _boots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "boot_time", lambda: BOOT_S)


def iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def claim(node: str, booted: str | None) -> list[Event]:
    """An earlier attempt; without a boot it did not pay for one."""
    return [{"kind": "claimed", "shape": {"node": node}, **({"booted": booted} if booted else {})}]


@pytest.mark.parametrize(
    ("after_s", "counts"), [(-1, False), (0, False), (1, True), (600, True), (3600, True), (3601, False)]
)
def test_a_boot_of_the_last_hour_counts(after_s: float, counts: bool) -> None:
    """One that is longer ago was for something else, and one to come is a clock's mistake."""
    found = paid_boot_time("n", tuple, environ=GCP, now=lambda: BOOT_S + after_s)
    assert found == (iso(BOOT_S) if counts else None)


@pytest.mark.parametrize("here", [environ("Slurm", "cluster"), {**GCP, USD_PER_H: "3"}, {}])
def test_a_machine_of_one_s_own_pays_for_no_boot(here: dict[str, str]) -> None:
    """And nobody reads the earlier events to learn that."""
    assert paid_boot_time("n", lambda: pytest.fail("asked"), environ=here, now=lambda: BOOT_S + 600) is None


@pytest.mark.parametrize(
    ("earlier", "counts"),
    [
        ([claim("n", iso(BOOT_S))], False),
        ([claim("n", iso(BOOT_S - 4))], False),
        ([claim("n", iso(BOOT_S)), claim("n", None)], False),
        ([claim("n", iso(BOOT_S)), claim("other", iso(BOOT_S + 900))], False),
        ([claim("n", iso(BOOT_S - 60))], True),
        ([claim("other", iso(BOOT_S))], True),
        ([claim("n", None)], True),
        ([[]], True),
    ],
    ids=[
        "same",
        "same, read 4 s apart",
        "third on it",
        "back on it",
        "booted again",
        "another",
        "told no boot",
        "said nothing",
    ],
)
def test_a_boot_is_paid_for_once(earlier: list[list[Event]], counts: bool) -> None:
    """By the first attempt of the run on that machine since it booted."""
    found = paid_boot_time("n", lambda: earlier, environ=GCP, now=lambda: BOOT_S + 1200)
    assert (found is not None) is counts

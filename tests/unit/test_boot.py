"""An attempt on a rented machine pays from the boot of the machine on, but only once for each boot."""

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
    """Return the events of an earlier attempt. Without `booted` it did not pay for a boot."""
    return [{"kind": "claimed", "shape": {"node": node}, **({"booted": booted} if booted else {})}]


@pytest.mark.parametrize(
    ("after_s", "counts"), [(-1, False), (0, False), (1, True), (600, True), (3600, True), (3601, False)]
)
def test_a_boot_of_the_last_hour_counts(after_s: float, counts: bool) -> None:
    """An older boot served something else, and a boot in the future is a wrong clock."""
    found = paid_boot_time("n", tuple, environ=GCP, now=lambda: BOOT_S + after_s)
    assert found == (iso(BOOT_S) if counts else None)


@pytest.mark.parametrize("here", [environ("Slurm", "cluster"), {**GCP, USD_PER_H: "3"}, {}])
def test_own_machines_pay_for_no_boot(here: dict[str, str]) -> None:
    """The events of earlier attempts are not even read."""
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
        "no boot paid",
        "no events",
    ],
)
def test_a_boot_is_paid_for_once(earlier: list[list[Event]], counts: bool) -> None:
    """The first attempt of the run on that machine since its boot pays for it."""
    found = paid_boot_time("n", lambda: earlier, environ=GCP, now=lambda: BOOT_S + 1200)
    assert (found is not None) is counts

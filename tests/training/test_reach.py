"""What the Hub's packages raise, told into what may pass and what does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from trainer.errors import ModelError, Unavailable
from trainer.recipe import DataSource
from trainer.worker import sources
from trainer.worker.failures import explained, out_of_reach


class TransportError(Exception):
    """As httpx, and the copy of it that the Hub's client brings, call theirs."""


class ReadTimeout(TransportError):
    """One of its kinds."""


def answered(status: int) -> Exception:
    """As `from_pretrained` raises it: found in no cache, because the Hub answered so."""
    error = HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    return came_of(OSError("We couldn't connect"), came_of(LocalEntryNotFoundError("not cached"), error))


def came_of(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error", [answered(503), answered(429), came_of(OSError(), ReadTimeout()), ConnectionError()]
)
def test_what_may_pass_is_recovered(error: Exception) -> None:
    """A run that is recovered while the Hub is down would end for good otherwise."""
    assert out_of_reach(error)
    assert isinstance(explained("org/model", error), Unavailable)


@pytest.mark.parametrize(
    "error", [answered(404), answered(401), OfflineModeIsEnabled(), OSError("no such file"), ValueError()]
)
def test_what_does_not_pass_is_the_users_to_mend(error: Exception) -> None:
    """Missing, gated, or with no wish to ask: another try would find the same."""
    assert not out_of_reach(error)
    assert isinstance(explained("org/model", error), ModelError)


def test_data_that_cannot_be_reached_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `load_dataset` says it."""

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", away)
    with pytest.raises(Unavailable, match="org/data"):
        sources._read(DataSource(id="org/data"), seed=0)

"""Errors of the Hub's packages are sorted into temporary and permanent ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from trainer.errors import ModelError, Unavailable
from trainer.recipe import DataSource
from trainer.worker import sources
from trainer.worker.failures import explained, out_of_reach


class TransportError(Exception):
    """Named like the base class of httpx, and of the copy of httpx in the Hub's client."""


class ReadTimeout(TransportError):
    """A timeout, which derives from it."""


def answered(status: int) -> Exception:
    """Return an error as `from_pretrained` raises it: a cache miss caused by the Hub's answer."""
    error = HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    return caused_by(OSError("We couldn't connect"), caused_by(LocalEntryNotFoundError("not cached"), error))


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error", [answered(503), answered(429), caused_by(OSError(), ReadTimeout()), ConnectionError()]
)
def test_a_temporary_error_is_recovered(error: Exception) -> None:
    """Otherwise a run that recovers while the Hub is down would end for good."""
    assert out_of_reach(error)
    assert isinstance(explained("org/model", error), Unavailable)


@pytest.mark.parametrize(
    "error", [answered(404), answered(401), OfflineModeIsEnabled(), OSError("no such file"), ValueError()]
)
def test_a_permanent_error_is_reported_to_the_user(error: Exception) -> None:
    """A missing or gated model, or offline mode: another try would fail too."""
    assert not out_of_reach(error)
    assert isinstance(explained("org/model", error), ModelError)


def test_unreachable_data_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` raises a `ConnectionError`."""

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", away)
    with pytest.raises(Unavailable, match="org/data"):
        sources._read(DataSource(id="org/data"), seed=0)

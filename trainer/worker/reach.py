"""A Hub that does not answer now, told from one that has not what was asked for: the former is worth another try."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.recipe.architecture import BUSY


def out_of_reach(error: BaseException) -> bool:
    """Whether an error, or what it came of, says that the way to a server, or the server itself, failed for now."""
    links = list(_links(error))
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in links):  # asked for, in the environment
        return False
    statuses = [status for link in links if (status := _status(link))]
    if statuses:
        return statuses[0] >= 500 or statuses[0] in BUSY
    return any(isinstance(link, ConnectionError | TimeoutError) or _is_transport(link) for link in links)


def _links(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Of the server's answer, as every client of HTTP that the Hub's packages use keeps it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_transport(error: BaseException) -> bool:
    """Of httpx, or of the copy that the Hub's client brings: no name, no connection, no answer in time, half of one."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)

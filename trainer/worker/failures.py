"""Classifies errors of the training stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.architecture.lookup import BUSY
from trainer.errors import ModelError, Unavailable, UserError


def explained(path: str, error: Exception) -> UserError:
    """What a failed load means to a user: `ModelError`, or `Unavailable` if the Hub may answer later."""
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    everything = f"{error!r} {error.__cause__!r}".lower()
    if "gated" in everything or "401" in everything or "403" in everything:
        hint = "it is gated: accept its terms on the Hub, and pass your token as $HF_TOKEN"
    elif Path(path).exists():
        hint = "the folder's files are damaged, or of an architecture that Transformers does not know"
    else:
        hint = "neither a folder here nor a model of the Hub that we can reach from this machine"
    if out_of_reach(error):
        return Unavailable(f"{path} cannot be loaded for now: {text}", hint=hint)
    return ModelError(f"{path} cannot be loaded: {text}", hint=hint)


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


SIGNS = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware stack error",
    "unspecified launch failure",
    "system not yet initialized",
    "devices are busy or unavailable",
    "device(s) is/are busy or unavailable",
    "no CUDA-capable device is detected",
    "CUDA error: unknown error",
)
"""What CUDA calls such errors
(https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html, `cudaError`). An illegal access is none: it is
mostly a kernel's own fault. A rank that is told of a partner's end says nothing of why that ended."""
HINT = "the run goes on from its newest commit; a machine that fails again and again is worth a report to who rents it out"


def broken(error: BaseException) -> str | None:
    """What a GPU's failure is called; None for any other error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in SIGNS):
            return str(link).partition("\n")[0]
        link = link.__cause__ or link.__context__
    return None

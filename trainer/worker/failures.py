"""Classifies errors of the training stack. No other module of the worker decides by the text of an error."""

from __future__ import annotations

from pathlib import Path

from trainer.architecture.lookup import BUSY
from trainer.disk_full import no_room
from trainer.errors import ModelError, Unavailable, UserError, error_chain
from trainer.job import Job, Outcome

BROKEN_GPU = (
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
"""Texts of CUDA errors that mean a failed GPU
(https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html, `cudaError`).

An illegal memory access is not among them, because it is usually a bug of a kernel. Neither is the error of a rank
whose partner died, because it does not name the cause.
"""
NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""Part of the message of every operation that PyTorch knows to have no deterministic kernel."""
NO_ACCESS = ("gated", "401", "403")
"""Parts of an error's text that mean that the Hub denied access to a model."""
GPU_HINT = "the run resumes from its newest commit; if the same machine fails again and again, report it to its provider"
DETERMINISM_HINT = (
    "another `attn_implementation` may have a deterministic kernel; with `full_determinism: false` the run trains,"
    " but a recovered run may differ slightly from an undisturbed one"
)


def outcome_of(error: BaseException, job: Job) -> Outcome | None:
    """Return the outcome that an error of a training means, or None for a bug.

    Errors that the user can fix keep their message. A full disk, a failed GPU and an operation without a
    deterministic kernel surface as errors of many types, so they are recognised along the chain of causes.
    For a full disk this also frees the space that the outcome file needs.
    """
    if isinstance(error, Unavailable):
        return Outcome(status="unavailable", message=error.message, hint=error.hint)
    if isinstance(error, UserError):
        return Outcome(status="user_error", message=error.message, hint=error.hint)
    if full := no_room(job, error):
        return full
    if line := _runtime_error_with(error, *BROKEN_GPU):
        return Outcome(status="unavailable", message=f"a GPU failed: {line}", hint=GPU_HINT)
    if line := _runtime_error_with(error, NOT_DETERMINISTIC):
        operation = line.partition(",")[0]
        message = f"{operation}: the run could not be recovered to the same bits"
        return Outcome(status="user_error", message=message, hint=DETERMINISM_HINT)
    return None


def explained(path: str, error: Exception) -> UserError:
    """Turn the error of a failed model load into one for the user.

    Args:
        path: the folder, file or Hub id that was loaded.
        error: the error that the load raised.

    Returns:
        Unavailable if the Hub may answer later, else ModelError.
    """
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    with_cause = f"{error!r} {error.__cause__!r}".lower()
    if any(sign in with_cause for sign in NO_ACCESS):
        hint = "the model is gated: accept its terms on the Hub, and pass your token as $HF_TOKEN"
    elif Path(path).exists():
        hint = "the files are damaged, or have an architecture that Transformers does not know"
    else:
        hint = "it is neither a local folder nor a model of the Hub that this machine can reach"
    if out_of_reach(error):
        return Unavailable(f"{path} cannot be loaded for now: {text}", hint=hint)
    return ModelError(f"{path} cannot be loaded: {text}", hint=hint)


def out_of_reach(error: BaseException) -> bool:
    """Return whether an error or one of its causes is a temporary failure of a server or of the network."""
    chain = list(error_chain(error))
    # The user disabled access to the Hub by an environment variable, so a later attempt would fail too.
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain):
        return False
    statuses = [status for link in chain if (status := http_status(link))]
    if statuses:
        return statuses[0] >= 500 or statuses[0] in BUSY
    return any(isinstance(link, ConnectionError | TimeoutError) or _is_transport(link) for link in chain)


def http_status(error: BaseException) -> int | None:
    """Return the status of the server's answer; all HTTP clients of the Hub's packages store it in this place."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_transport(error: BaseException) -> bool:
    """Return whether this is a transport error of httpx, or of the copy of httpx inside the Hub's client.

    Such errors mean: no such host, no connection, a timeout, or an incomplete answer.
    """
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _runtime_error_with(error: BaseException, *signs: str) -> str | None:
    """Return the first line of the first RuntimeError in the chain whose text contains one of `signs`."""
    for link in error_chain(error):
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in signs):
            return str(link).partition("\n")[0]
    return None

"""Translate SkyPilot's exceptions into our messages: what happened, SkyPilot's own text, and a hint.

They are recognised by their class names (`sky/exceptions.py`, 0.14.1), so that this file needs no SkyPilot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from trainer.errors import Unavailable, UserError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
MAX_TRIED = 8
"""Largest number of places that a message lists."""


class _Fault(NamedTuple):
    message: str
    """What happened; SkyPilot's own text follows."""
    hint: str | None
    passes: bool = False
    """Whether the same request may succeed later, without a fix."""


API_SERVER = _Fault("SkyPilot's API server does not answer", "`sky api status`, then `sky api start`", True)
ACCESS = _Fault(
    "no cloud is enabled for this",
    "`sky check` lists the enabled clouds and how to enable one; `--infra` names another",
)
CONTROLLER = _Fault(
    "the controller of managed jobs is not running", "`sky jobs queue --refresh` starts it again", True
)
STORE = _Fault(
    "a bucket of the task is unavailable", "see `file_mounts` of the task, and the cloud's credentials"
)
KNOWN: Mapping[str, _Fault] = {
    "ApiServerConnectionError": API_SERVER,
    "ServerTemporarilyUnavailableError": API_SERVER,
    "RequestInterruptedError": API_SERVER,
    "ConcurrentWorkerExhaustedError": API_SERVER,
    "ApiServerAuthenticationError": _Fault("SkyPilot's API server refuses your login", "`sky api login`"),
    "APIVersionMismatchError": _Fault(
        "SkyPilot and its API server have different versions", "`sky api stop`, then try again"
    ),
    "NoCloudAccessError": ACCESS,
    "InvalidCloudCredentials": ACCESS,
    "InvalidCloudConfigs": ACCESS,
    "CloudUserIdentityError": ACCESS,
    "ClusterOwnerIdentityMismatchError": _Fault(
        "the cluster belongs to another identity", "see `sky check`, or choose another `--name`"
    ),
    "ProvisionPrechecksError": ACCESS,
    "ResourcesMismatchError": _Fault(
        "the cluster exists with other machines than the task asks for",
        "`launcher down RUN` first, or choose another `--name`",
    ),
    "ClusterNotUpError": CONTROLLER,
    "ClusterSetUpError": _Fault("the machine could not be set up", "`launcher logs RUN` has the rest"),
    "ManagedJobReachedMaxRetriesError": _Fault("no machine was available after many attempts", None, True),
    "NotSupportedError": _Fault("SkyPilot does not support this on that infrastructure", None),
    "InvalidClusterNameError": _Fault(
        "SkyPilot does not accept this cluster name", "choose another `--name`"
    ),
    "UserRequestRejectedByPolicy": _Fault("the policy of your SkyPilot server refused it", None),
    "StorageError": STORE,
    "StorageSpecError": STORE,
    "InvalidSkyPilotConfigError": _Fault("SkyPilot's settings are invalid", "see ~/.sky/config.yaml"),
    "RequestCancelled": _Fault("the request was cancelled elsewhere", None, True),
    "CommandError": _Fault("a command on the machine failed", "`launcher logs RUN` has the rest"),
    "NetworkError": _Fault("the network is down", None, True),
}
NO_CAPACITY = (
    "`--retry-until-up` waits for a machine; `plan` lists other GPUs; the cloud's console raises quotas"
)
ABSENT = ("ClusterDoesNotExist",)
CONNECTION = ("ConnectionError", "Timeout", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError")
"""Exceptions of requests, the library by which SkyPilot connects to its server."""


def sort_fault(error: BaseException, doing: str) -> UserError | None:
    """Return an exception of SkyPilot as a UserError; None for a bug, in SkyPilot or here.

    Args:
        error: what SkyPilot raised.
        doing: the action that failed, such as `launch a-run`.
    """
    names = [cls.__name__ for cls in type(error).__mro__]
    if "ResourcesUnavailableError" in names:
        return _no_capacity(error, doing)
    fault = next((KNOWN[name] for name in names if name in KNOWN), None)
    if fault is None and type(error).__name__ in CONNECTION:
        fault = API_SERVER
    if fault is None and isinstance(error, ValueError | RuntimeError):  # raised for an invalid request
        fault = _Fault("SkyPilot refused it", None)
    if fault is None:
        return None
    kind = Unavailable if fault.passes else UserError
    return kind(f"cannot {doing}: {fault.message}{_text_of(error)}", hint=fault.hint)


def absent(error: BaseException) -> bool:
    """Return whether the error means that the cluster does not exist."""
    return any(cls.__name__ in ABSENT for cls in type(error).__mro__)


def plain(text: str) -> str:
    """Return the text without terminal colours."""
    return _ANSI.sub("", text)


def _no_capacity(error: BaseException, doing: str) -> UserError:
    """Return the error for a lack of machines, with the answer of each place that was tried."""
    history: Iterable[BaseException] = getattr(error, "failover_history", ())
    answers = list(dict.fromkeys(_first_line(one) for one in history))
    tried = [f"\n  tried: {answer}" for answer in answers[:MAX_TRIED]]
    more = [f"\n  and {len(answers) - MAX_TRIED} more"] if len(answers) > MAX_TRIED else []
    message = f"cannot {doing}: no machine is available{_text_of(error)}{''.join(tried + more)}"
    return Unavailable(message, hint=NO_CAPACITY)


def _text_of(error: BaseException) -> str:
    text = plain(str(error)).strip()
    return f": {text}" if text else ""


def _first_line(error: BaseException) -> str:
    lines = plain(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__

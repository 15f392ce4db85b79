"""SkyPilot's exceptions as our messages: what happened, with its own words, and the way out.

Told apart by the names of their classes (`sky/exceptions.py`, 0.14.1), so that this needs no SkyPilot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from trainer.errors import Unavailable, UserError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
MAX_TRIED = 8
"""Places that a message lists."""


class _Fault(NamedTuple):
    says: str
    """What happened; SkyPilot's own words follow."""
    hint: str | None
    passes: bool = False
    """Whether trying again may help, with nothing mended."""


API_SERVER = _Fault("SkyPilot's API server does not answer", "`sky api status`, then `sky api start`", True)
ACCESS = _Fault(
    "no cloud is enabled for this",
    "`sky check` says which are, and how to enable one; `--infra` names another",
)
CONTROLLER = _Fault(
    "the controller of managed jobs is not there", "`sky jobs queue --refresh` starts it again", True
)
STORE = _Fault(
    "a bucket of the task cannot be had", "see `file_mounts` of the task, and the cloud's credentials"
)
KNOWN: Mapping[str, _Fault] = {
    "ApiServerConnectionError": API_SERVER,
    "ServerTemporarilyUnavailableError": API_SERVER,
    "RequestInterruptedError": API_SERVER,
    "ConcurrentWorkerExhaustedError": API_SERVER,
    "ApiServerAuthenticationError": _Fault("SkyPilot's API server does not know you", "`sky api login`"),
    "APIVersionMismatchError": _Fault("SkyPilot here and its API server differ", "`sky api stop`, and again"),
    "NoCloudAccessError": ACCESS,
    "InvalidCloudCredentials": ACCESS,
    "InvalidCloudConfigs": ACCESS,
    "CloudUserIdentityError": ACCESS,
    "ClusterOwnerIdentityMismatchError": _Fault(
        "the cluster belongs to another identity", "see `sky check`, or choose another `--name`"
    ),
    "ProvisionPrechecksError": ACCESS,
    "ResourcesMismatchError": _Fault(
        "the cluster is there, and has other machines than this asks for",
        "`launcher down RUN` first, or choose another `--name`",
    ),
    "ClusterNotUpError": CONTROLLER,
    "ClusterSetUpError": _Fault("the machine could not be set up", "`launcher logs RUN` has the rest"),
    "ManagedJobReachedMaxRetriesError": _Fault("no machine could be had, and it was tried often", None, True),
    "NotSupportedError": _Fault("SkyPilot cannot do this there", None),
    "InvalidClusterNameError": _Fault("the name cannot be a cluster's", "choose another `--name`"),
    "UserRequestRejectedByPolicy": _Fault("your site's policy for SkyPilot refused it", None),
    "StorageError": STORE,
    "StorageSpecError": STORE,
    "InvalidSkyPilotConfigError": _Fault("SkyPilot's settings are wrong", "see ~/.sky/config.yaml"),
    "RequestCancelled": _Fault("the request was cancelled elsewhere", None, True),
    "CommandError": _Fault("a command on the machine failed", "`launcher logs RUN` has the rest"),
    "NetworkError": _Fault("the network is down", None, True),
}
NO_CAPACITY = "`--retry-until-up` waits for a machine; `plan` lists other GPUs; a quota is raised in the cloud's console"
ABSENT = ("ClusterDoesNotExist",)
CONNECTION = ("ConnectionError", "Timeout", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError")
"""Of requests, with which SkyPilot speaks to its server."""


def sort_fault(error: BaseException, doing: str) -> UserError | None:
    """What a user should read of an exception while `doing` something; None for a bug, SkyPilot's or ours."""
    names = [cls.__name__ for cls in type(error).__mro__]
    if "ResourcesUnavailableError" in names:
        return _no_capacity(error, doing)
    fault = next((KNOWN[name] for name in names if name in KNOWN), None)
    if fault is None and type(error).__name__ in CONNECTION:
        fault = API_SERVER
    if fault is None and isinstance(error, ValueError | RuntimeError):  # SkyPilot's words for a wrong request
        fault = _Fault("SkyPilot refused it", None)
    if fault is None:
        return None
    kind = Unavailable if fault.passes else UserError
    return kind(f"cannot {doing}: {fault.says}{_said(error)}", hint=fault.hint)


def absent(error: BaseException) -> bool:
    """Whether it says that there is no such cluster."""
    return any(cls.__name__ in ABSENT for cls in type(error).__mro__)


def plain(text: str) -> str:
    """Without the terminal's colours."""
    return _ANSI.sub("", text)


def _no_capacity(error: BaseException, doing: str) -> UserError:
    """What was tried where, and what each place answered."""
    history: Iterable[BaseException] = getattr(error, "failover_history", ())
    answers = list(dict.fromkeys(_first_line(one) for one in history))
    tried = [f"\n  tried: {answer}" for answer in answers[:MAX_TRIED]]
    more = [f"\n  and {len(answers) - MAX_TRIED} more"] if len(answers) > MAX_TRIED else []
    message = f"cannot {doing}: no machine can be had{_said(error)}{''.join(tried + more)}"
    return Unavailable(message, hint=NO_CAPACITY)


def _said(error: BaseException) -> str:
    text = plain(str(error)).strip()
    return f": {text}" if text else ""


def _first_line(error: BaseException) -> str:
    lines = plain(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__

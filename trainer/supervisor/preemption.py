"""The preemption notice: one flag that signals and Google's metadata server set, and that the supervisor reads."""

from __future__ import annotations

import logging
import os
import signal
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, InvalidURL
from types import FrameType
from typing import NamedTuple

from trainer.supervisor.save_window import GCP_SPOT, Window

log = logging.getLogger(__name__)
HOST_VARIABLE = "GCE_METADATA_HOST"  # Google's own libraries use the same name
HOST = "metadata.google.internal"
FLAVOR = "Metadata-Flavor"
SOURCE = "GCE preemption"
REQUEST_TIMEOUT_S = 3.0
WAIT_FOR_CHANGE_S = 30
"""After this time the server answers a request that waits for a change, even without a change."""
TRANSIENT_STATUS = {408, 429}
"""Together with 5xx these mean, by Google's documentation, that the server is being updated and will answer again."""


class Notice:
    """The notice that this machine is about to be preempted, or that the run must stop.

    The first source sets it, and later sources change nothing. The sources are signals (SkyPilot, Slurm and
    `docker stop` send SIGTERM, Ctrl-C sends SIGINT), `MetadataWatcher` on Google's machines, and the run's limits.
    """

    def __init__(self) -> None:
        self.window: Window | None = None
        """How long before the preemption this machine gives notice. None if unknown."""
        self._given = threading.Event()
        self._source = ""

    @property
    def given(self) -> bool:
        return self._given.is_set()

    @property
    def source(self) -> str:
        """The source of the notice: "SIGTERM", "SIGINT", "GCE preemption", "budget", "deadline"."""
        return self._source

    def give(self, source: str) -> None:
        """Set the notice, unless it is set already."""
        if not self._given.is_set():
            self._source = source
            self._given.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until notice is given, for at most `timeout_s` seconds. Return whether it was given."""
        return self._given.wait(timeout_s)

    def handle_signals(self) -> None:
        """Make SIGTERM and SIGINT set the notice. Call it on the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.give(signal.Signals(number).name)


class MetadataAnswer(NamedTuple):
    """A value of the metadata server, and the tag by which the server recognizes it."""

    value: str
    etag: str


def backoff_s(failures: int) -> float:
    """Return the seconds to pause after this many failures in a row: doubled each time, up to a minute."""
    return min(60.0, 0.5 * 2.0**failures)


class MetadataWatcher(threading.Thread):
    """Waits until GCE's `instance/preempted` becomes TRUE, and then gives notice.

    The thread ends by itself on a machine without a metadata server. It is a daemon thread that no other thread
    joins, so it delays neither the start nor the exit of the program.
    """

    def __init__(
        self,
        notice: Notice,
        *,
        environ: Mapping[str, str] = os.environ,
        timeout_s: float = REQUEST_TIMEOUT_S,
        wait_for_change_s: int = WAIT_FOR_CHANGE_S,
        pause: Callable[[int], float] = backoff_s,
    ) -> None:
        """Prepare the thread.

        Args:
            notice: the flag to set.
            environ: may name another server in $GCE_METADATA_HOST.
            timeout_s: timeout of a request that does not wait for a change.
            wait_for_change_s: how long the server may hold a request that waits for a change.
            pause: seconds to pause after a number of failures in a row.
        """
        super().__init__(name="metadata", daemon=True)
        self._notice = notice
        self._root = f"http://{environ.get(HOST_VARIABLE) or HOST}/computeMetadata/v1/"
        self._timeout_s = timeout_s
        self._wait_for_change_s = wait_for_change_s
        self._pause = pause
        # The environment's proxies are not used, since the server is on the machine itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def run(self) -> None:
        try:
            self._watch()
        except _NoServer as error:
            log.debug("no preemption notices from GCE on this machine: %s", error)

    def request(self, key: str, query: Mapping[str, str], timeout_s: float) -> MetadataAnswer:
        """Send one request and return its answer.

        Raises:
            _NoServer: there is no metadata server.
            _ServerBusy: the server does not answer this request.
        """
        url = f"{self._root}{key}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers={FLAVOR: "Google"})  # noqa: S310 (http only, by design)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                if answer.headers.get(FLAVOR) != "Google":
                    raise _NoServer(f"{self._root} answers without the header {FLAVOR}")
                return MetadataAnswer(answer.read().decode().strip(), answer.headers.get("ETag", "0"))
        except urllib.error.HTTPError as error:
            error.close()
            transient = error.code >= 500 or error.code in TRANSIENT_STATUS
            raise (_ServerBusy if transient else _NoServer)(f"{url} answers {error.code}") from None
        except urllib.error.URLError as error:  # the host is unknown or refuses the connection
            raise _NoServer(f"{self._root}: {error.reason}") from None
        except InvalidURL as error:
            raise _NoServer(str(error)) from None
        except (OSError, HTTPException) as error:  # after the connection: timeout, reset or an invalid answer
            raise _ServerBusy(f"{url}: {error!r}") from None

    def _watch(self) -> None:
        """Watch for a preemption. Only the first request may find that there is no server; later errors are retried."""
        answer = self._request_with_retries("instance/preempted")
        if answer and self._is_spot():
            self._notice.window = GCP_SPOT
        while answer:
            if answer.value == "TRUE":
                self._notice.give(SOURCE)
                return
            self._notice.wait(self._pause(0))  # limits the rate if the server does not support waiting
            answer = self._request_with_retries("instance/preempted", after=answer)

    def _is_spot(self) -> bool:
        try:
            return self.request("instance/scheduling/preemptible", {}, self._timeout_s).value == "TRUE"
        except (_NoServer, _ServerBusy) as error:
            log.debug("cannot find out from GCE whether this is a spot machine: %s", error)
            return False

    def _request_with_retries(
        self, key: str, *, after: MetadataAnswer | None = None
    ) -> MetadataAnswer | None:
        """Request a value until the server answers. Return None once notice is given.

        With `after`, the server holds the request until the value differs from that answer.

        Raises:
            _NoServer: only without `after`.
        """
        query, timeout_s = {}, self._timeout_s
        if after:
            query = {
                "wait_for_change": "true",
                "timeout_sec": str(self._wait_for_change_s),
                "last_etag": after.etag,
            }
            timeout_s += self._wait_for_change_s
        failures = 0
        while not self._notice.given:
            try:
                return self.request(key, query, timeout_s)
            except (_NoServer, _ServerBusy) as error:
                if after is None and isinstance(error, _NoServer):
                    raise
                log.debug("retrying a failed request to the metadata server: %s", error)
            failures += 1
            self._notice.wait(self._pause(failures))
        return None


def query_metadata(
    key: str, *, environ: Mapping[str, str] = os.environ, timeout_s: float = REQUEST_TIMEOUT_S
) -> str | None:
    """Return the metadata server's value of `key`. None without a server, such a key, or a timely answer."""
    try:
        return MetadataWatcher(Notice(), environ=environ).request(key, {}, timeout_s).value
    except (_NoServer, _ServerBusy) as error:
        log.debug("no value of %s from GCE: %s", key, error)
        return None


class _NoServer(Exception):
    """There is no server at the address, or it is not a metadata server."""


class _ServerBusy(Exception):
    """The metadata server exists but does not answer now."""

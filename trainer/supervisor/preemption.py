"""How a machine says that it is about to go, as one flag that the supervisor reads."""

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


class Notice:
    """Set once, by the first sign that the machine goes; later signs change nothing.

    SIGTERM is what SkyPilot, Slurm and `docker stop` send; SIGINT is a person's Ctrl-C; what GCE says
    is `trainer.supervisor.preemption`'s to hear.
    """

    def __init__(self) -> None:
        self.window: Window | None = None
        """How long a notice is on this machine; None where nobody says."""
        self._given = threading.Event()
        self._source = ""

    @property
    def given(self) -> bool:
        return self._given.is_set()

    @property
    def source(self) -> str:
        """What gave the notice: "SIGTERM", "SIGINT", "GCE preemption"."""
        return self._source

    def give(self, source: str) -> None:
        if not self._given.is_set():
            self._source = source
            self._given.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep for `timeout_s` seconds, or until notice is given; whether it was."""
        return self._given.wait(timeout_s)

    def listen(self) -> None:
        """Take SIGTERM and SIGINT for this process; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.give(signal.Signals(number).name)


log = logging.getLogger(__name__)
HOST_VARIABLE = "GCE_METADATA_HOST"  # as Google's own libraries have it
HOST = "metadata.google.internal"
FLAVOR = "Metadata-Flavor"
SOURCE = "GCE preemption"
LOOK_S = 3.0
WAIT_S = 30
"""Seconds after which the server is to answer a waiting request, changed or not."""
PASSING_STATUS = {408, 429}  # and 5xx: the server is being updated, says its documentation


class MetadataAnswer(NamedTuple):
    value: str
    etag: str


class _NoServer(Exception):
    """Nothing there, or something that is no metadata server."""


class _ServerBusy(Exception):
    """The server is there, and does not answer now."""


def pause_s(failures: int) -> float:
    """Seconds between requests, after so many failures in a row."""
    return min(60.0, 0.5 * 2.0**failures)


def look_up(key: str, *, environ: Mapping[str, str] = os.environ, timeout_s: float = LOOK_S) -> str | None:
    """What the server has under `key` now; None where there is no server, no such key, or no answer in time."""
    try:
        return Metadata(Notice(), environ=environ).ask(key, {}, timeout_s).value
    except (_NoServer, _ServerBusy) as error:
        log.debug("GCE does not say %s: %s", key, error)
        return None


class Metadata(threading.Thread):
    """Waits for `instance/preempted` to turn and gives notice; ends by itself where there is no such server.

    A daemon that nobody waits for: it neither slows the start nor holds up the exit.
    """

    def __init__(
        self,
        notice: Notice,
        *,
        environ: Mapping[str, str] = os.environ,
        look_s: float = LOOK_S,
        wait_s: int = WAIT_S,
        pause: Callable[[int], float] = pause_s,
    ) -> None:
        super().__init__(name="metadata", daemon=True)
        self._notice = notice
        self._root = f"http://{environ.get(HOST_VARIABLE) or HOST}/computeMetadata/v1/"
        self._look_s = look_s
        self._wait_s = wait_s
        self._pause = pause
        # Proxies of the environment are for the world outside; the server is on the machine itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def run(self) -> None:
        try:
            self._watch()
        except _NoServer as error:
            log.debug("no notice from GCE on this machine: %s", error)

    def _watch(self) -> None:
        """One look first, which shows whether this is GCE; from then on no fault ends the watch."""
        answer = self._persistently("instance/preempted")
        if answer and self._is_spot():
            self._notice.window = GCP_SPOT
        while answer:
            if answer.value == "TRUE":
                self._notice.give(SOURCE)
                return
            self._notice.wait(self._pause(0))  # a server that does not know how to wait is not hammered
            answer = self._persistently("instance/preempted", after=answer)

    def _is_spot(self) -> bool:
        try:
            return self.ask("instance/scheduling/preemptible", {}, self._look_s).value == "TRUE"
        except (_NoServer, _ServerBusy) as error:
            log.debug("GCE does not say whether this machine is spot: %s", error)
            return False

    def _persistently(self, key: str, *, after: MetadataAnswer | None = None) -> MetadataAnswer | None:
        """An answer, `after` another one as soon as the value differs from it; None once notice was given.

        Raises:
            _NoServer: at the first look only.
        """
        query, timeout_s = {}, self._look_s
        if after:
            query = {"wait_for_change": "true", "timeout_sec": str(self._wait_s), "last_etag": after.etag}
            timeout_s += self._wait_s
        failures = 0
        while not self._notice.given:
            try:
                return self.ask(key, query, timeout_s)
            except (_NoServer, _ServerBusy) as error:
                if after is None and isinstance(error, _NoServer):
                    raise
                log.debug("the metadata server fails, and is asked again: %s", error)
            failures += 1
            self._notice.wait(self._pause(failures))
        return None

    def ask(self, key: str, query: Mapping[str, str], timeout_s: float) -> MetadataAnswer:
        """One request; raises what says that there is no server, or none that answers now."""
        url = f"{self._root}{key}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers={FLAVOR: "Google"})  # noqa: S310 (http only, by design)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                if answer.headers.get(FLAVOR) != "Google":
                    raise _NoServer(f"{self._root} answers without the header {FLAVOR}")
                return MetadataAnswer(answer.read().decode().strip(), answer.headers.get("ETag", "0"))
        except urllib.error.HTTPError as error:
            error.close()
            passing = error.code >= 500 or error.code in PASSING_STATUS
            raise (_ServerBusy if passing else _NoServer)(f"{url} answers {error.code}") from None
        except urllib.error.URLError as error:  # no such host, or no connection to it
            raise _NoServer(f"{self._root}: {error.reason}") from None
        except InvalidURL as error:
            raise _NoServer(str(error)) from None
        except (OSError, HTTPException) as error:  # connected, then time-out, reset or nonsense
            raise _ServerBusy(f"{url}: {error!r}") from None

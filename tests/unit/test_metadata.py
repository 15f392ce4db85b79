"""The notice that Google's metadata server gives, and what becomes of the watch where there is none."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest

from tests.harness import wait_until
from tests.servers.metadata import MetadataServer
from trainer.supervisor.preemption import HOST_VARIABLE, SOURCE, MetadataWatcher, Notice, backoff_s
from trainer.supervisor.save_window import GCP_SPOT

SHORT_S = 0.2


@pytest.fixture
def notice() -> Iterator[Notice]:
    given = Notice()
    yield given
    given.give("the end of the test")  # which ends a watch that still runs


def watch(
    notice: Notice, host: str, *, timeout_s: float = 30.0, wait_for_change_s: int = 30
) -> MetadataWatcher:
    metadata = MetadataWatcher(
        notice,
        environ={HOST_VARIABLE: host},
        timeout_s=timeout_s,
        wait_for_change_s=wait_for_change_s,
        pause=lambda _: 0.01,
    )
    metadata.start()
    return metadata


def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_a_preemption_gives_notice_while_the_watch_waits_for_it(notice: Notice) -> None:
    """The server answers the request that is already there, so nothing is lost to polling."""
    with MetadataServer() as server:
        metadata = watch(notice, server.host)
        wait_until(server.waiting, "a request that waits", timeout_s=30)
        assert not notice.given
        server.preempt()
        assert notice.wait(30)
        metadata.join(30)
        assert notice.source == SOURCE
        assert notice.window == GCP_SPOT
        assert {asked.flavor for asked in server.asked} == {"Google"}
        assert server.asked[-1].query == {
            "wait_for_change": "true",
            "timeout_sec": "30",
            "last_etag": "etag-of-FALSE",
        }


def test_a_machine_that_is_already_going_says_so_at_the_first_look(notice: Notice) -> None:
    """A run that is started on it does not train."""
    with MetadataServer() as server:
        server.preempt()
        watch(notice, server.host)
        assert notice.wait(30)


def test_a_machine_that_is_not_spot_promises_no_window(notice: Notice) -> None:
    """The 30 s are those of spot machines."""
    with MetadataServer(spot=False) as server:
        watch(notice, server.host)
        wait_until(server.waiting, "a request that waits", timeout_s=30)
        assert notice.window is None


def test_a_server_that_is_busy_for_a_while_is_asked_again(notice: Notice) -> None:
    """503 is what it answers while it is updated, at the first look as well as later."""
    with MetadataServer() as server:
        server.busy = 3
        watch(notice, server.host, wait_for_change_s=0)
        wait_until(server.waiting, "a second look", timeout_s=30)
        server.busy = 3
        wait_until(lambda: server.busy == 0, "three refusals", timeout_s=30)
        server.preempt()
        assert notice.wait(30)


def test_a_server_that_hangs_is_asked_again(notice: Notice) -> None:
    """A request without an answer ends by its time-out, also when a preempted machine waits for it."""
    with MetadataServer() as server:
        server.hangs = 1
        watch(notice, server.host, timeout_s=SHORT_S, wait_for_change_s=0)
        wait_until(server.waiting, "a second look", timeout_s=30)
        server.hangs = 2
        wait_until(lambda: server.hangs == 0, "two requests without an answer", timeout_s=30)
        server.preempt()
        assert notice.wait(30)


def test_a_server_that_was_seen_and_is_away_is_waited_for(notice: Notice) -> None:
    """A refused connection ends the watch at the first look only."""
    failures: list[int] = []

    def pause(count: int) -> float:
        failures.append(count)
        return 0.01

    with MetadataServer() as server:
        metadata = MetadataWatcher(
            notice, environ={HOST_VARIABLE: server.host}, wait_for_change_s=0, pause=pause
        )
        metadata.start()
        wait_until(server.waiting, "a second look", timeout_s=30)
    wait_until(lambda: 3 in failures, "three tries of a server that is away", timeout_s=30)
    assert metadata.is_alive()


@pytest.mark.parametrize(
    "host",
    [f"127.0.0.1:{unused_port()}", "no-such-host.invalid", "not a host"],
    ids=["port", "name", "words"],
)
def test_a_machine_elsewhere_is_looked_at_once_in_silence(
    notice: Notice, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No host, or nothing behind it: the thread ends, and the log says so to those who debug."""
    with caplog.at_level(logging.DEBUG):
        watch(notice, host).join(60)
    assert not notice.given
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_server_without_the_header_is_not_googles(notice: Notice) -> None:
    """A proxy that answers for every name must not preempt a run."""
    with MetadataServer(flavor=None) as server:
        server.preempt()
        metadata = watch(notice, server.host)
        metadata.join(30)
        assert not metadata.is_alive()
        assert not notice.given
        assert len(server.asked) == 1


def test_a_notice_from_elsewhere_ends_the_watch(notice: Notice) -> None:
    """A machine gives notice once."""
    with MetadataServer() as server:
        metadata = watch(notice, server.host, wait_for_change_s=1)
        wait_until(server.waiting, "a request that waits", timeout_s=30)
        notice.give("SIGTERM")
        metadata.join(30)
        assert not metadata.is_alive()
    assert notice.source == "SIGTERM"


def test_pauses_grow_to_a_minute() -> None:
    """A server that is away is not hammered."""
    assert [backoff_s(failures) for failures in (0, 1, 3, 100)] == [0.5, 1.0, 4.0, 60.0]

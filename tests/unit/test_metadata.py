"""The watch of Google's metadata server gives notice of a preemption, and ends on machines without such a server."""

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
    given.give("the end of the test")  # ends a watcher that is still running


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


def test_a_preemption_answers_the_waiting_request(notice: Notice) -> None:
    """The server answers a request that is already waiting, so polling adds no delay."""
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


def test_a_machine_that_is_already_being_preempted_gives_notice_at_once(notice: Notice) -> None:
    """A run that is started on such a machine does not train."""
    with MetadataServer() as server:
        server.preempt()
        watch(notice, server.host)
        assert notice.wait(30)


def test_an_on_demand_machine_has_no_window(notice: Notice) -> None:
    """Only spot machines have a notice of 30 s."""
    with MetadataServer(spot=False) as server:
        watch(notice, server.host)
        wait_until(server.waiting, "a request that waits", timeout_s=30)
        assert notice.window is None


def test_a_busy_server_is_retried(notice: Notice) -> None:
    """The server answers 503 while it is being updated. The first request and later ones are retried."""
    with MetadataServer() as server:
        server.busy = 3
        watch(notice, server.host, wait_for_change_s=0)
        wait_until(server.waiting, "a second request", timeout_s=30)
        server.busy = 3
        wait_until(lambda: server.busy == 0, "three refusals", timeout_s=30)
        server.preempt()
        assert notice.wait(30)


def test_a_request_that_times_out_is_retried(notice: Notice) -> None:
    """A request that is never answered must not keep the notice of a later preemption from arriving."""
    with MetadataServer() as server:
        server.hangs = 1
        watch(notice, server.host, timeout_s=SHORT_S, wait_for_change_s=0)
        wait_until(server.waiting, "a second request", timeout_s=30)
        server.hangs = 2
        wait_until(lambda: server.hangs == 0, "two requests without an answer", timeout_s=30)
        server.preempt()
        assert notice.wait(30)


def test_a_server_that_stops_answering_is_retried(notice: Notice) -> None:
    """A refused connection ends the watch only at the first request."""
    failures: list[int] = []

    def pause(count: int) -> float:
        failures.append(count)
        return 0.01

    with MetadataServer() as server:
        metadata = MetadataWatcher(
            notice, environ={HOST_VARIABLE: server.host}, wait_for_change_s=0, pause=pause
        )
        metadata.start()
        wait_until(server.waiting, "a second request", timeout_s=30)
    wait_until(lambda: 3 in failures, "three failed requests", timeout_s=30)
    assert metadata.is_alive()


@pytest.mark.parametrize(
    "host",
    [f"127.0.0.1:{unused_port()}", "no-such-host.invalid", "not a host"],
    ids=["port", "name", "words"],
)
def test_a_machine_outside_gce_ends_the_watch_silently(
    notice: Notice, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread ends after one request, and only a debug line is logged."""
    with caplog.at_level(logging.DEBUG):
        watch(notice, host).join(60)
    assert not notice.given
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_server_without_googles_header_is_ignored(notice: Notice) -> None:
    """A proxy that answers for every name must not preempt a run."""
    with MetadataServer(flavor=None) as server:
        server.preempt()
        metadata = watch(notice, server.host)
        metadata.join(30)
        assert not metadata.is_alive()
        assert not notice.given
        assert len(server.asked) == 1


def test_a_notice_from_another_source_ends_the_watch(notice: Notice) -> None:
    """A notice is given only once, so there is nothing left to watch for."""
    with MetadataServer() as server:
        metadata = watch(notice, server.host, wait_for_change_s=1)
        wait_until(server.waiting, "a request that waits", timeout_s=30)
        notice.give("SIGTERM")
        metadata.join(30)
        assert not metadata.is_alive()
    assert notice.source == "SIGTERM"


def test_pauses_grow_to_a_minute() -> None:
    """A server that does not answer is asked at most once a minute."""
    assert [backoff_s(failures) for failures in (0, 1, 3, 100)] == [0.5, 1.0, 4.0, 60.0]

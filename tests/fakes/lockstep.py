"""Connects the ranks of a fake program on several nodes, so that all of them stop at the same step."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

TIMEOUT_S = 60.0
RETRY_S = 0.02


class Lockstep:
    """The counterpart of an all-reduce of real ranks. It connects at the address in torchrun's variables."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._rank, ranks = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        self._others: list[socket.socket] = []
        if ranks == 1:
            return
        address = (environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
        if self._rank:
            self._others = [_connect(address)]
            return
        with socket.create_server(address) as server:
            server.settimeout(TIMEOUT_S)
            self._others = [server.accept()[0] for _ in range(1, ranks)]

    def any(self, flag: bool) -> bool:
        """Return whether any rank passes True.

        Raises:
            ConnectionError: another rank is lost.
        """
        if self._rank:
            _send(self._others[0], flag)
            return _receive(self._others[0])
        raised = any([flag, *map(_receive, self._others)])
        for other in self._others:
            _send(other, raised)
        return raised


def _connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return socket.create_connection(address, timeout=TIMEOUT_S)
        except ConnectionRefusedError:  # rank 0 does not listen yet
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def _send(other: socket.socket, flag: bool) -> None:
    other.sendall(bytes([flag]))


def _receive(other: socket.socket) -> bool:
    if not (data := other.recv(1)):
        raise ConnectionError("another rank is lost")
    return bool(data[0])

"""The ranks of a fake program on several nodes: at each step all hear whether any of them was told to stop."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

PATIENCE_S = 60.0
RETRY_S = 0.02


class Lockstep:
    """What an all-reduce is to real ranks; they meet where torchrun's variables say."""

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
            server.settimeout(PATIENCE_S)
            self._others = [server.accept()[0] for _ in range(1, ranks)]

    def any(self, flag: bool) -> bool:
        """Whether any rank says so.

        Raises:
            ConnectionError: one of them is gone.
        """
        if self._rank:
            _say(self._others[0], flag)
            return _hear(self._others[0])
        raised = any([flag, *map(_hear, self._others)])
        for other in self._others:
            _say(other, raised)
        return raised


def _connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection(address, timeout=PATIENCE_S)
        except ConnectionRefusedError:  # rank 0 is not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def _say(other: socket.socket, flag: bool) -> None:
    other.sendall(bytes([flag]))


def _hear(other: socket.socket) -> bool:
    if not (data := other.recv(1)):
        raise ConnectionError("another rank is gone")
    return bool(data[0])

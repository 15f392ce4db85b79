"""Ports that nobody has, and ports where somebody listens."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_ports(*names: str) -> dict[str, int]:
    """A port of loopback for each, all different: they are held until the last is found."""
    with ExitStack() as held:
        probes = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        return {name: int(probe.getsockname()[1]) for name, probe in probes.items()}


def answers(port: int) -> bool:
    """Whether somebody listens there, on loopback."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False

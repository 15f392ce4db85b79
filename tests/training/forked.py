"""A rank that is a fork of a process that has imported the stack: `python -m tests.training.forked JOB_JSON`.

For the process that starts it, it is the rank: same variables and files, same exit code, and its death is the rank's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

ADDRESS_VARIABLE, PROGRAM_VARIABLE = "AEOLUS_TESTS_WARM", "AEOLUS_TESTS_PROGRAM"
"""Where the warm process listens, and the module that the rank is to be; not seen by the rank."""


def main() -> None:
    address = bytes.fromhex(os.environ.pop(ADDRESS_VARIABLE))
    program = os.environ.pop(PROGRAM_VARIABLE)
    request = json.dumps([program, sys.argv[1:], str(Path.cwd()), dict(os.environ)])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [request.encode()], [0, 1, 2])
        code = int(server.recv(16) or b"1")  # 1: the server itself has ended
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()

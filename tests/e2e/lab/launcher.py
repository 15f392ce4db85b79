"""The launcher as a person of the laboratory has it: on a machine that knows this SkyPilot and this bucket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.e2e.lab.namespace import Namespace
from tests.harness import ROOT

ALL = """
import contextlib, io, json, sys
from launcher.cli import cli
def said(words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(words, standalone_mode=False)
    return json.loads(out.getvalue())
print(json.dumps([said(words) for words in json.loads(sys.argv[1])]))
"""


class Launcher:
    """`python -m launcher`, with a memory of its own of what it has submitted."""

    def __init__(self, inside: Namespace, state: Path, environ: Mapping[str, str]) -> None:
        """`environ`: how the bucket is reached, and where the cluster has the trainer."""
        self._inside = inside
        self._environ = {**environ, "XDG_STATE_HOME": str(state), "COLUMNS": "200"}

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        command = [sys.executable, "-m", "launcher", *words]
        return self._inside.run(*command, cwd=ROOT, environ=self._environ, timeout_s=900.0, check=check)

    def status(self, run: str) -> dict[str, Any]:
        """The run's row of `status --json`."""
        rows: list[dict[str, Any]] = json.loads(self.run("status", "--json").stdout)
        [row] = [row for row in rows if row["run"] == run]
        return row

    def answers(self, commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """What each of the commands prints as JSON; one process for all, because `import sky` takes seconds."""
        words = json.dumps([list(command) for command in commands])
        done = self._inside.run(
            sys.executable, "-c", ALL, words, cwd=ROOT, environ=self._environ, timeout_s=900.0
        )
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found

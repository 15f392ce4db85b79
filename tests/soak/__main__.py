"""`python -m tests.soak`: exit code 0 if no commit was lost and no resume diverged, else 1."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.servers.s3 import environ, make_bucket, s3_server
from tests.soak.soak import Result, Trial, soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=["folder", "s3"], default="folder")
    parser.add_argument("--real", action="store_true", help="the real trainer on a tiny model")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    with _store(given.store, folder) as checkpoints, _progress() as progress:
        task = progress.add_task("kills", total=given.kills, facts="the undisturbed run")

        def told(result: Result) -> None:
            progress.update(task, completed=result.kills, facts=f"{result.runs} runs done")

        result = soak(Trial(checkpoints, folder / "machine", given.kills, given.seed, given.real), told)
    for line in (*result.lost, *result.diverged, *result.failed):
        print(line)  # noqa: T201 (a program's answer)
    kept = "" if result.good else f"; what is left is in {folder}"
    print(f"{result}\nseed {given.seed}, {time.monotonic() - began:.0f} s{kept}")  # noqa: T201
    if result.good:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if result.good else 1


@contextmanager
def _store(kind: str, folder: Path) -> Iterator[str]:
    if kind == "folder":
        yield str(folder / "bucket")
        return
    with s3_server() as url:
        make_bucket(url, "soak")
        os.environ.update(environ(url))
        yield "s3://soak/runs"


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())

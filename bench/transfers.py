"""Run one transfer in its own process, which separates its CPU time and its peak memory.

`python bench/transfers.py PEER up|down FOLDER URI`: prints the wall and CPU seconds as its last line. What is timed
is the transfer: a supervisor has long since started.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import obstore
from obstore.store import S3Store

AT_ONCE = 16
PART_BYTES = 16 * 2**20
CHECKPOINT = "checkpoint-1"
Spent = tuple[float, float]
"""Wall seconds and CPU seconds."""


def now() -> Spent:
    return time.perf_counter(), time.process_time()


def since(began: Spent) -> Spent:
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def ours(way: str, folder: Path, uri: str) -> Spent:
    """Call commit() and restore() as the supervisor does."""
    from trainer.bucket import open_run
    from trainer.bucket.attempts import claim
    from trainer.bucket.commit import commit
    from trainer.bucket.restore import restore
    from trainer.staged import Staged

    bucket = open_run(uri, "run")
    attempt = claim(bucket, {})
    began = now()
    if way == "up":
        commit(bucket, attempt, folder, Staged(folder=CHECKPOINT, step=1), "digest")
    else:
        restore(bucket, folder, lambda step, reason: sys.exit(f"{step}: {reason}"))
    return since(began)


def limit(way: str, folder: Path, uri: str, *, parts: bool = False) -> Spent:
    """PUT from memory and GET into memory. No file is read or written while the clock runs."""
    store = S3Store.from_url(uri, client_options={"allow_http": True})
    if way == "down":
        keys = [meta["path"] for page in obstore.list(store) for meta in page]
        return asyncio.run(_all(_gets(store, keys)))
    bodies = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    return asyncio.run(_all(_puts(store, bodies, parts=parts)))


def _puts(store: S3Store, bodies: dict[str, bytes], *, parts: bool) -> list[Callable[[], Awaitable[object]]]:
    def put(key: str, body: bytes) -> Callable[[], Awaitable[object]]:
        whole = not parts or len(body) <= PART_BYTES
        return lambda: obstore.put_async(
            store, key, body, use_multipart=not whole, chunk_size=PART_BYTES, max_concurrency=AT_ONCE
        )

    return [put(key, body) for key, body in bodies.items()]


def _gets(store: S3Store, keys: list[str]) -> list[Callable[[], Awaitable[object]]]:
    """Transfer whole objects, because obstore does not accept the range answers of `rclone serve s3`."""

    async def get(key: str) -> object:
        return await (await obstore.get_async(store, key)).bytes_async()

    return [partial(get, key) for key in keys]


async def _all(calls: list[Callable[[], Awaitable[object]]]) -> Spent:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        async with gate:
            await call()

    began = now()
    await asyncio.gather(*map(one, calls))
    return since(began)


PEERS: dict[str, Callable[[str, Path, str], Spent]] = {
    "ours": ours,
    "limit": limit,
    "limit-parts": lambda way, folder, uri: limit(way, folder, uri, parts=True),
}

if __name__ == "__main__":
    peer, way, folder, uri = sys.argv[1:]
    print(*PEERS[peer](way, Path(folder), uri), flush=True)
    os._exit(0)  # without it a child once aborted on its way out; why was not found

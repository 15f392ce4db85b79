"""Measure the build time of the trainer's image, from scratch and after a change, and its size: `python bench/image.py`.

On a machine with no Docker engine, as root on Debian: podman by chroot, a plain Debian made from its packages,
torch without CUDA, a registry on loopback. All of it is gone afterwards.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher.render import duration, size
from tests.e2e.image.site import Site, wheels
from tests.e2e.image.site import site as brought_up

BASE = "localhost/plain-debian"


def main() -> None:
    with brought_up() as site:
        started = time.monotonic()
        site.make_base(BASE)
        print(f"{'the base, from packages':28} {duration(time.monotonic() - started)}")
        measure(site)


def measure(site: Site) -> None:
    torch = ["--wheels", str(folder)] if (folder := wheels()) else ["--torch", "cpu"]
    options = [
        "--builder",
        "podman",
        "--base",
        BASE,
        *torch,
        "--registry",
        site.registry("registry"),
        "--push",
    ]
    report = timed(site, "built and pushed", options)
    timed(site, "nothing changed", options)
    with (site.checkout / "trainer" / "errors.py").open("a") as file:
        file.write("# changed\n")
    timed(site, "a trainer file changed", options)
    for layer in report["layers"]:
        print(f"{size(layer['size_bytes']):>10}  {step_of(layer['step'])}")
    print(f"{size(sum(layer['size_bytes'] for layer in report['layers'])):>10}  in all")


def timed(site: Site, what: str, options: list[str]) -> dict[str, list[dict[str, str]]]:
    started = time.monotonic()
    done = site.build("--json", *options)
    if done.returncode != 0:
        sys.exit(done.stderr[-4000:])
    print(f"{what:28} {duration(time.monotonic() - started)}")
    return json.loads(done.stdout)


def step_of(step: str) -> str:
    """Return the end of a step, which names what it installs. The rest is the same in all steps."""
    words = step.replace("/bin/sh -c", "").replace("#(nop)", "").split()
    return " ".join(words)[-80:]


if __name__ == "__main__":
    main()

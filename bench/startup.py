"""Measure how long a laptop command takes to answer: `python bench/startup.py`.

Median of fresh processes, beside the peers that it must not load: `import sky`, and a bare `import click`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "python -c pass": ["-c", "pass"],
    "import click": ["-c", "import click"],
    "launcher --help": ["-m", "launcher", "--help"],
    "launcher submit --help": ["-m", "launcher", "submit", "--help"],
    "trainer run --help": ["-m", "trainer", "run", "--help"],
    "import sky": ["-c", "import sky"],
}
RUNS = 7


def seconds(arguments: list[str]) -> float:
    """Return the wall time of one fresh Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    for name, arguments in CASES.items():
        times = [seconds(arguments) for _ in range(RUNS)]
        print(
            f"{name:24} {statistics.median(times):6.2f} s   (best {min(times):.2f}, worst {max(times):.2f}, n={RUNS})"
        )


if __name__ == "__main__":
    main()

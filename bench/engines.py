"""Compare FSDP2, ZeRO-3 and DDP with two processes on this machine: `.venv-trainer/bin/python -m bench.engines`.

The same run under each, in turn, several times over: seconds and CPU seconds of a step, a rank's memory, a save, a
restore by as many processes and by one. A restore's time is what preparing takes with a checkpoint beyond what it takes
without. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.engines_rank import LEAVES
from trainer.fit import fit
from trainer.hardware import Shape
from trainer.job import Job
from trainer.recipe import load
from trainer.supervisor.workers import Workers

ENGINES = ("ddp", "zero3", "fsdp2")
RANKS, STEPS, SAVE, WARM = 2, 8, 4, 2
RECIPE = (
    "max_train_samples=200",
    "max_test_samples=4",
    "global_batch_size=8",
    "micro_batch_size=8",
    "max_length=128",
    f"max_steps={STEPS}",
    f"save_steps={SAVE}",
    "eval_strategy=no",
    "learning_rate=1.0e-3",
)
HERE = Shape(accelerator=None, count=0, memory_gib=None, cores=1, host_memory_gib=64.0, node="bench")
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc return freed memory to the system. Otherwise memory that was needed once would count as used."""
MIB = 2**20


class Ran(NamedTuple):
    """One run, with all of its ranks."""

    lines: list[dict[str, Any]]
    ranks: list[dict[str, Any]]

    def of(self, kind: str, key: str) -> list[float]:
        return [float(line[key]) for line in self.lines if line["kind"] == kind]

    def step_s(self) -> float:
        return statistics.median(self.of("step", "step_s")[WARM:])

    def cpu_s(self) -> float:
        """The median step over all ranks, which ignores the outliers that saves are."""
        each = [statistics.median(_differences(rank["cpu_s"])[WARM:]) for rank in self.ranks]
        return sum(each)

    def peak_mib(self) -> float:
        """The memory of the rank with the most, minus what it had before the model was loaded."""
        return max(rank["peak_mib"] - rank["before_mib"] for rank in self.ranks)

    def prepared_s(self) -> float:
        return max(float(rank["prepared_s"]) for rank in self.ranks)


def _differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def job_of(work: Path, engine: str, *, ranks: int, tiny: str, resume_from: Path | None) -> Job:
    recipe = load("zephyr-tiny/sft", (*RECIPE, f"tiny={tiny}")).recipe
    decided = fit(recipe, HERE, None)
    if ranks == 1 and engine == "ddp":
        engine = "single"
    micro = recipe.global_batch_size // RANKS // 2
    layout = {"processes": ranks, "engine": engine, "micro_batch": micro, "threads": 1}
    layout["accumulation"] = recipe.global_batch_size // (ranks * micro)
    work.mkdir(parents=True)
    made = Job(
        run_id="bench", attempt=1, recipe=recipe, fit=type(decided).model_validate({**decided.model_dump(), **layout}),
        work=work, model=None, resume_from=resume_from,
    )  # fmt: skip
    made.staging.mkdir()
    return made


def run(job: Job) -> Ran:
    workers = Workers(job, sys.executable, "bench.engines_rank")
    try:
        while workers.poll() is None:
            workers.wait(0.2)
    finally:
        workers.kill()
    if code := workers.poll():
        raise RuntimeError(f"{job.fit.engine} on {job.fit.processes} ended with {code}")
    lines = [json.loads(line) for line in job.steps.read_text().splitlines()]
    ranks = [json.loads(path.read_text()) for path in sorted(job.work.glob("measured-*.json"))]
    return Ran(lines, ranks)


class Bench:
    """The runs by engine. Folders are deleted as soon as they are not needed."""

    def __init__(self, scratch: Path, tiny: str) -> None:
        self._scratch, self._tiny, self._count = scratch, tiny, 0
        self.whole: dict[str, list[Ran]] = {engine: [] for engine in ENGINES}
        self.restored: dict[tuple[str, int], list[float]] = {}
        self.kept: dict[str, Path] = {}

    def train(self, engine: str) -> None:
        job = self._job(engine, RANKS, None)
        self.whole[engine].append(run(job))
        if engine in self.kept:
            shutil.rmtree(job.work)
        else:
            self.kept[engine] = job.staging / f"checkpoint-{SAVE}"

    def prepare(self, engine: str, ranks: int) -> None:
        """Measure a start without the checkpoint, then one with it."""
        bare, full = (self._left(engine, ranks, folder) for folder in (None, self.kept[engine]))
        self.restored.setdefault((engine, ranks), []).append(full - bare)

    def _left(self, engine: str, ranks: int, folder: Path | None) -> float:
        """Return the seconds of the preparation, in a run that ends after it."""
        os.environ[LEAVES] = "1"
        job = self._job(engine, ranks, folder)
        took = run(job).prepared_s()
        del os.environ[LEAVES]
        shutil.rmtree(job.work)
        return took

    def _job(self, engine: str, ranks: int, folder: Path | None) -> Job:
        self._count += 1
        work = self._scratch / f"{self._count:03}-{engine}-{ranks}"
        print(work.name, file=sys.stderr, flush=True)
        return job_of(work, engine, ranks=ranks, tiny=self._tiny, resume_from=folder)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the text `median (least to most)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(bench: Bench) -> str:
    columns: dict[str, Callable[[Ran], float]] = {
        "step, s": Ran.step_s,
        "CPU of a step, both ranks, s": Ran.cpu_s,
        "peak of a rank, MiB": Ran.peak_mib,
        "save, s": lambda ran: statistics.median(ran.of("saved", "stall_s")),
    }
    rows = ["| | " + " | ".join(columns) + " | checkpoint, MiB | largest difference of a loss from DDP's |"]
    rows.append("|---|" + "--:|" * (len(columns) + 2))
    theirs = bench.whole["ddp"][0].of("step", "loss")
    for engine, runs in bench.whole.items():
        digits = [0 if "MiB" in name else 2 for name in columns]
        cells = [
            spread([value(ran) for ran in runs], n) for n, value in zip(digits, columns.values(), strict=True)
        ]
        size = runs[0].of("saved", "bytes")[0] / MIB
        off = max(abs(one - other) for one, other in zip(runs[0].of("step", "loss"), theirs, strict=True))
        rows.append(f"| {engine} | {' | '.join(cells)} | {size:.0f} | {off:.1e} |")
    rows += ["", "| restore | on 2, s | on 1, s |", "|---|--:|--:|"]
    for engine in ENGINES:
        took = [spread(bench.restored[engine, ranks], 2) for ranks in (RANKS, 1)]
        rows.append(f"| {engine} | {' | '.join(took)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--restores", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    tiny = (
        f"{{hidden_size: {options.hidden}, intermediate_size: {options.hidden * 7 // 2}, num_hidden_layers: {options.layers}, "
        "num_attention_heads: 8, num_key_value_heads: 2, vocab_size: 2000}"
    )
    os.environ |= RETURNED
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), tiny)
        for _ in range(options.repeats):
            for engine in ENGINES:
                bench.train(engine)
        for _ in range(options.restores):
            for ranks in (RANKS, 1):
                for engine in ENGINES:
                    bench.prepare(engine, ranks)
        started = next(line for line in bench.whole["ddp"][0].lines if line["kind"] == "started")
        print(
            f"{started['parameters'] / 1e6:.1f} million parameters, {STEPS} steps, {options.repeats} times\n"
        )
        print(tables(bench))


if __name__ == "__main__":
    main()

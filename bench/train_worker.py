"""Run our trainer with a stopwatch that measures our own part of each step, not the model's. Used by `bench/train.py`.

`python bench/train_worker.py RECIPE BUCKET WORK` supervises a run whose worker is this module; `-m bench.train_worker
JOB` is that worker. $BENCH_PLAIN makes it deal rows to micro batches in plain order, not by length.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PLAIN, TIMES = "BENCH_PLAIN", "BENCH_TIMES"
Times = dict[str, float]


def timed(times: Times, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def timing(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            times[name] = times.get(name, 0.0) + time.perf_counter() - began

    return timing


def timed_items(times: Times, name: str, items: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def each(*arguments: Any) -> Iterator[Any]:
        iterator = items(*arguments)
        take = timed(times, name, lambda: next(iterator, None))
        while (item := take()) is not None:
            yield item

    return each


def watch(times: Times) -> None:
    """Wrap everything that we add to a step with the stopwatch."""
    from trainer.worker import sampling
    from trainer.worker.callback import Progress, TrainedTokens
    from trainer.worker.supervisor_channel import Channel

    TrainedTokens.hook = timed(times, "what the model sees, kept", TrainedTokens.hook)  # type: ignore[method-assign]
    TrainedTokens.take = timed(times, "of it: digest, tokens, memory", TrainedTokens.take)  # type: ignore[method-assign]
    Channel.say = timed(times, "of it: lines to the supervisor", Channel.say)  # type: ignore[method-assign]
    Progress.on_log = timed(times, "after each step: what it was", Progress.on_log)  # type: ignore[method-assign]
    Progress.on_step_end = timed(  # type: ignore[method-assign]
        times, "after each step: stop or save?", Progress.on_step_end
    )
    sampling.Batches.__iter__ = timed_items(times, "order of rows", sampling.Batches.__iter__)  # type: ignore[method-assign]


class Clocks(NamedTuple):
    """CPU seconds of the worker, all its threads."""

    steps: list[float]
    """Times at the end of each step."""
    reference: list[float]
    """Seconds of each pass that computed reference log-probabilities."""


def watch_cpu(clocks: Clocks) -> None:
    from trainer.worker.callback import Progress
    from trainer.worker.reference_logps import Reference

    original_on_log, computed = Progress.on_log, Reference._compute  # noqa: SLF001

    def on_log(self: Any, *arguments: Any, logs: dict[str, Any] | None = None, **named: Any) -> None:
        original_on_log(self, *arguments, logs=logs, **named)
        if "loss" in (logs or {}):
            clocks.steps.append(time.process_time())

    def compute(self: Any, *arguments: Any) -> None:
        before = time.process_time()
        computed(self, *arguments)
        clocks.reference.append(time.process_time() - before)

    Progress.on_log = on_log  # type: ignore[assignment,method-assign]
    Reference._compute = compute  # type: ignore[method-assign]  # noqa: SLF001


def work() -> None:
    from trainer.worker import __main__ as worker
    from trainer.worker import sampling

    times: Times = {}
    clocks = Clocks([], [])
    watch(times)
    watch_cpu(clocks)
    if os.environ.get(PLAIN):
        sampling.may_sort = lambda _recipe: False
    try:
        worker.main()
    finally:
        Path(os.environ[TIMES]).write_text(json.dumps({"times": times, **clocks._asdict()}))


def supervise(recipe: str, bucket: str, scratch: str) -> int:
    """Do what `python -m trainer run` does, and print at the end how much CPU time the supervisor used."""
    import logging

    from trainer.recipe import load
    from trainer.supervisor.attempt import RunRequest
    from trainer.supervisor.preemption import Notice
    from trainer.supervisor.run import run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    request = RunRequest(
        recipe=load(recipe, ()).recipe,
        checkpoints=bucket,
        run_id="run",
        program="bench.train_worker",
        work=Path(scratch),
    )
    before, began = time.process_time(), time.perf_counter()
    code = run(request, Notice())
    share = (time.process_time() - before) / (time.perf_counter() - began)
    print(f"supervisor's CPU: {share:.5f}", flush=True)
    return int(code)


if __name__ == "__main__":
    work() if len(sys.argv) == 2 else sys.exit(supervise(*sys.argv[1:]))

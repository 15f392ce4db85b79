"""Events of runs over three clouds, with prices, a plan, preempted spot machines, saves and restores."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from tests.fakes.runs import write_commit, write_events
from trainer.events import Event, EventLog, parse

BEGIN = datetime(2026, 3, 14, 9, 0, tzinfo=UTC)
PLAN: dict[str, Any] = {
    "hours": 3.1,
    "usd": 41.0,
    "usd_per_h": 13.18,
    "market": "spot",
    "gpu_gib": 74.0,
    "host_gib": 316.0,
    "step_s": 7.5,
}
SHAPE = {
    "accelerator": "A100-80GB",
    "count": 8,
    "memory_gib": 79.2,
    "cores": 96,
    "host_memory_gib": 1360.0,
    "nodes": 1,
}
GPU_TERMS = {
    "parameters": 13.5,
    "reference": 13.5,
    "gradients": 1.7,
    "optimizer": 6.7,
    "activations": 31.2,
    "CUDA": 1.0,
    "fragmentation": 6.4,
}
HOST_TERMS = {"processes": 24.0, "staged checkpoints": 242.0, "loading": 50.0}


class Leg(NamedTuple):
    """One attempt of a journey."""

    infra: str
    market: str | None
    usd_per_h: float | None
    last: int
    """The last step."""
    end: str | None
    """Kind of the last event. None: the machine was lost without an event."""
    gap_s: float = 0.0
    """Seconds since the end of the attempt before."""
    step_s: float = 7.5
    boot_s: float = 0.0
    """Seconds from the boot to the claim, at most `gap_s`. 0: the claim has no boot time."""


LEGS = (
    Leg("gcp/us-central1", "spot", 13.18, 143, None),
    Leg("gcp/us-east5", "spot", 13.18, 268, "preempted", gap_s=540),
    Leg("lambda/us-east-1", "on demand", 22.32, 290, "failed", gap_s=260, step_s=7.0),
    Leg("nebius/eu-north1", "spot", 11.84, 478, "done", gap_s=1500, step_s=7.9),
)
"""About four hours over three clouds."""


class Journey:
    """Creates the events that a supervisor would write, with a simulated clock."""

    def __init__(self, *, total_steps: int, save_steps: int = 50, seed: int = 0, method: str = "dpo") -> None:
        self._total = total_steps
        self._save = save_steps
        self._random = random.Random(seed)
        self._method = method
        self._now = BEGIN
        self._committed = 0
        self.attempts: list[list[Event]] = []

    def add(self, leg: Leg, *, plan: dict[str, Any] | None = PLAN) -> None:
        """Add an attempt that resumes from the newest commit."""
        self._now += timedelta(seconds=leg.gap_s)
        self._log = EventLog(len(self.attempts) + 1, self._keep)
        self._events: list[Event] = []
        cloud, _, region = leg.infra.partition("/")
        price = {"usd_per_h": leg.usd_per_h, "market": leg.market, "cloud": cloud, "region": region or None}
        self._add(
            "claimed", 0, run="fake", method=self._method, recipe=f"zephyr-7b/{self._method}_full",
            shape={**SHAPE, "node": f"{cloud}-node"}, fit=_fit(), price=price, plan=plan,
            **({"booted": (self._now - timedelta(seconds=leg.boot_s)).isoformat()} if leg.boot_s else {}),
        )  # fmt: skip
        start, size = self._committed, 55_000_000_000
        facts = (
            {"from_attempt": len(self.attempts), "files": 61, "bytes": size, "seconds": 85.0} if start else {}
        )
        self._add(
            "restored", 85 if start else 1, **{"step": start, "files": 0, "bytes": 0, "seconds": 0.0, **facts}
        )
        self._add("started", 95, step=start, total_steps=self._total, samples=61_000)
        self._train(leg, start, size)
        self._end(leg, size)
        self.attempts.append(self._events)

    def _train(self, leg: Leg, start: int, size: int) -> None:
        train_s = 0.0
        for step in range(start + 1, leg.last + 1):
            took = leg.step_s * self._random.uniform(0.95, 1.08)
            train_s += took
            self._add("step", took, step=step, total_steps=self._total, **self._metrics(step), step_s=took,
                      train_s=train_s, tokens_per_s=128 * 2 * 420 / took, gpu_peak_gib=70.4, host_peak_gib=181.0)  # fmt: skip
            if step % self._save == 0 or step == self._total:
                loss = 0.51 + 0.19 * math.exp(-step / 130)
                self._add("eval", 55, step=step, eval_loss=loss, **{"eval_rewards/accuracies": 0.76 - 0.26 * math.exp(-step / 120)}, seconds=55.0)  # fmt: skip
                self._add("saved", 11, step=step, bytes=size, stall_s=11.0)
                self._add("committed", 0.5, step=step, files=61, bytes=size, seconds=64.0, weights_digest="")
                self._committed = step

    def _end(self, leg: Leg, size: int) -> None:
        if leg.end == "preempted":
            self._add("notice", 1, source="GCE's metadata server")
            self._add("saved", 11, step=leg.last, bytes=size, stall_s=11.0)
            self._add("preempted", 10, message=f"at step {leg.last}, which is not saved")
        elif leg.end == "failed":
            self._add(
                "failed", 4, message="the workers died of SIGBUS <on GPU 3> & left no outcome", exit_code=75
            )
        elif leg.end == "done":
            self._add(
                "exported",
                80,
                step=leg.last,
                files=9,
                bytes=14_500_000_000,
                seconds=41.0,
                weights_digest="9f" * 16,
            )
            self._add("done", 1, step=leg.last, weights_digest="9f" * 16)

    def _metrics(self, step: int) -> dict[str, float]:
        noise = self._random.gauss(0, 1)
        return {
            "loss": 0.50 + 0.19 * math.exp(-step / 120) + 0.022 * noise,
            "learning_rate": 5e-7 * min(1.0, step / 48),
            "rewards/accuracies": min(1.0, max(0.0, 0.77 - 0.27 * math.exp(-step / 110) + 0.035 * noise)),
        }

    def _add(self, kind: Any, after_s: float, /, **fields: Any) -> None:
        self._now += timedelta(seconds=after_s)
        event = self._log.add(kind, **fields)
        self._events.append({**event, "time": self._now.isoformat()})

    def _keep(self, data: bytes) -> None:
        parse(data)


def journey(legs: Sequence[Leg] = LEGS, *, total_steps: int = 478, seed: int = 0, method: str = "dpo",
            plan: dict[str, Any] | None = PLAN) -> list[list[Event]]:  # fmt: skip
    """Return the events of each attempt."""
    made = Journey(total_steps=total_steps, seed=seed, method=method)
    for leg in legs:
        made.add(leg, plan=plan)
    return made.attempts


def write_journey(run: Path, attempts: Sequence[list[Event]]) -> None:
    """Write a run's folder as supervisors do. A run that is done has a committed final model."""
    write_events(run, *attempts)
    for event in (event for events in attempts for event in events):
        if event["kind"] == "committed":
            write_commit(run, f"step-{event['step']:08d}", created=event["time"])
        if event["kind"] == "done":
            write_commit(run, "final", created=event["time"])
    (run / "run.json").write_text(json.dumps({"run_id": run.name, "created": BEGIN.isoformat()}))


def _fit() -> dict[str, Any]:
    def usage(terms: dict[str, float]) -> dict[str, Any]:
        return {"terms": [{"name": name, "gib": gib, "why": "fake"} for name, gib in terms.items()]}

    return {
        "processes": 8, "nodes": 1, "micro_batch": 2, "engine": "zero2", "attention": "flash_attention_2",
        "activation_checkpointing": False, "reference": "model", "accumulation": 8, "threads": 12, "use_cpu": False,
        "gpu": usage(GPU_TERMS), "host": usage(HOST_TERMS), "reasons": ["ZeRO-2"],
    }  # fmt: skip

"""Kills training runs at random moments, again and again, and holds their buckets to what they promised."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import RunView, TrainerRun
from tests.soak import moments
from tests.soak.ledger import Ledger, Reference, reference

KEEP = 3
FAST = """
method: sft
init: tiny
dataset_mixture: {{datasets: [{{id: "generated:chats"}}]}}
global_batch_size: 4
max_steps: 200
save_steps: 20
save_total_limit: {keep}
"""
REAL = """
method: sft
init: tiny
tiny: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, vocab_size: 600}}
dataset_mixture: {{datasets: [{{id: "generated:chats", split: train}}]}}
max_train_samples: 60
global_batch_size: 16
micro_batch_size: 4
max_length: 96
learning_rate: 2.0e-3
lr_scheduler_type: cosine
warmup_steps: 0.1
max_steps: 24
save_steps: 3
save_total_limit: {keep}
eval_strategy: "no"
logging_steps: 1
bf16: false
seed: 7
"""


@dataclass(frozen=True)
class Trial:
    """What is to be killed, where it keeps its checkpoints, and what decides when."""

    checkpoints: str
    folder: Path
    """Of this machine: recipes, work folders, logs."""
    kills: int
    seed: int
    real: bool = False
    """The real trainer on a tiny model, in place of the counting program."""
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What came of it."""

    hits: Counter[str] = field(default_factory=Counter)
    """Kills, by what the machine was at."""
    runs: int = 0
    """Runs that came to their end."""
    commits: int = 0
    """Checkpoints that were seen committed."""
    lost: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Attempts that ended by themselves and were not done."""

    @property
    def kills(self) -> int:
        return self.hits.total()

    @property
    def good(self) -> bool:
        return not (self.lost or self.diverged or self.failed)

    def __str__(self) -> str:
        hits = ", ".join(f"{where} {count}" for where, count in self.hits.most_common())
        return (
            f"kills {self.kills} ({hits}); runs done {self.runs}; commits seen {self.commits}\n"
            f"commits lost {len(self.lost)}, resumes that diverge {len(self.diverged)}"
        )


def soak(trial: Trial, told: Callable[[Result], None] = lambda _: None) -> Result:
    """Run after run until there were as many kills; the last run is brought to its end undisturbed."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    expected = _undisturbed(trial)
    result, chance, number = Result(), random.Random(trial.seed), 0
    while result.kills < trial.kills and result.good:
        number += 1
        _one_run(trial, f"run-{number:04d}", expected, chance, result, told)
    return result


def _undisturbed(trial: Trial) -> Reference:
    """Keeps every checkpoint, so that those of the disturbed runs can be compared one by one."""
    began = time.monotonic()
    with _attempt(trial, "whole", keep=1000) as run:
        assert run.wait() == 0, run.log
    return reference(RunView(trial.checkpoints, "whole"), time.monotonic() - began)


def _one_run(
    trial: Trial,
    run_id: str,
    expected: Reference,
    chance: random.Random,
    result: Result,
    told: Callable[[Result], None],
) -> None:
    view = RunView(trial.checkpoints, run_id)
    ledger = Ledger(view, expected, KEEP)
    last = max(expected.told)
    done = False
    while not done and not (ledger.lost or ledger.diverged or result.failed):
        moment = moments.choose(chance, after=ledger.newest, last=last, span_s=expected.seconds)
        with _attempt(trial, run_id, keep=KEEP) as run:
            if result.kills < trial.kills and moments.reach(run, view, moment):
                killed = run.lose_machine() < 0
            else:
                killed = run.wait() < 0
            if killed:
                result.hits[moments.where(run, view, KEEP)] += 1
            elif run.wait() != 0:
                result.failed.append(f"{run_id} ended with exit code {run.wait()}:\n{run.log[-3000:]}")
            done = run.wait() == 0
        shutil.rmtree(trial.folder / "work" / run_id, ignore_errors=True)  # the next one is another machine
        ledger.look()
        told(result)
    _conclude(run_id, ledger, result, done=done)
    if result.good:  # a thousand runs would fill the disk
        view.bucket.delete([item.key for item in view.bucket.list()])


def _conclude(run_id: str, ledger: Ledger, result: Result, *, done: bool) -> None:
    if done:
        ledger.conclude()
        result.runs += 1
    result.commits += len(ledger.seen)
    result.lost += [f"{run_id}: {line}" for line in ledger.lost]
    result.diverged += [f"{run_id}: {line}" for line in ledger.diverged]


def _attempt(trial: Trial, run_id: str, *, keep: int) -> TrainerRun:
    recipe = trial.folder / f"keeps-{keep}.yaml"
    recipe.write_text((REAL if trial.real else FAST).format(keep=keep))
    return TrainerRun(
        recipe,
        trial.checkpoints,
        run_id,
        trial.folder / "work" / run_id,
        environ=trial.environ,
        module="trainer" if trial.real else "tests.soak.attempt",
    )

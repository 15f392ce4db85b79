"""Compare predicted with published times: `python bench/estimate.py` prints the table of `bench/estimate.md`.

Needs the contract modules only: neither torch nor a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # run as a script from anywhere

from published import RUNS, Published  # noqa: E402

from trainer.estimate import Estimate, estimate  # noqa: E402
from trainer.estimate.batch import count_evaluations  # noqa: E402


def predict(run: Published) -> tuple[float, Estimate]:
    """Return the value in the run's own unit, and the whole estimate."""
    found = estimate(
        run.recipe, run.architecture, run.layout, run.shape, run.workload,
        stack=run.stack, network_gbps=run.network_gbps, in_order=False,
    )  # fmt: skip
    match run.unit:
        case "hours":
            return found.work_s / 3600, found
        case "tokens/s/GPU":
            return found.tokens_per_s / run.layout.processes, found
        case "s/step":
            return found.step_s, found
        case _:
            spread = sum(term.seconds for term in found.terms if term.name == "evaluation")
            return spread * found.steps / count_evaluations(run.recipe, found.steps), found


def main() -> None:
    verbose = "-v" in sys.argv[1:]
    print("| run | unit | published | predicted | off | |\n|---|---|--:|--:|--:|---|")
    for run in RUNS:
        value, found = predict(run)
        off = value / run.value - 1
        digits = {"hours": 2, "s/step": 1}.get(run.unit, 0)
        role = "sets" if run.sets else "checks"
        print(
            f"| [{run.name}]({run.source}) | {run.unit} | {run.value:.{digits}f} | {value:.{digits}f} "
            f"| {off:+.0%} | {role}{'; ' + run.note if run.note else ''} |"
        )
        if verbose:
            print(*(f"    {term.name:24} {term.seconds:8.3f}  {term.why}" for term in found.terms), sep="\n")


if __name__ == "__main__":
    main()

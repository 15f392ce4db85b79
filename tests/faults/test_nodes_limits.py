"""Two nodes with a budget or a deadline: node 0 watches it, both save the same step, and both log why they stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.runs.run import Reader
from tests.faults.test_nodes import assert_alike, checkpoints, finish, nodes, recipe  # noqa: F401 (fixtures)
from tests.harness import RunView
from trainer.accounting import attempt_cost
from trainer.bucket.manifest import committed
from trainer.errors import ExitCode
from trainer.options import BUDGET_USD, DEADLINE_H, PRICES
from trainer.supervisor.price import CLUSTER

USD_PER_S_OF_A_NODE = 0.5
BOTH_USD_PER_H = 2 * USD_PER_S_OF_A_NODE * 3600
BUDGET = 8.0
"""It lasts 8 s for two nodes. It would last 16 s for one."""
PRICED = {
    CLUSTER: json.dumps({"cloud": "Kubernetes", "region": "here"}),
    PRICES: json.dumps(
        [{"infra": "kubernetes/here", "gpus": "None:0", "market": "on demand", "usd_per_h": BOTH_USD_PER_H}]
    ),
}
"""The environment that the launcher gives to each node. The price is that of all nodes together.

The place is not a cloud, because there the boot of the machine that runs this test might count."""


def both_stop(recipe: Path, checkpoints: str, limits: Mapping[str, str]) -> list[str]:  # noqa: F811
    """Run both nodes until they end with the exit code of a used-up limit, and return their logs."""
    with nodes(recipe, checkpoints, "limited", step_s=0.5, extra={**PRICED, **limits}) as both:
        codes = [node.wait(60) for node in both]
        logs = [node.log for node in both]
    assert codes == [ExitCode.LIMIT, ExitCode.LIMIT] == [79, 79], "\n".join(logs)
    return logs


def assert_dollars_of_both(view: RunView) -> None:
    """Check that each second costs the price of two machines, in the budget and in the accounting."""
    (claimed,), (stopped,) = view.events("claimed"), view.events("stopped")
    assert (claimed["shape"]["nodes"], claimed["price"]["usd_per_h"]) == (2, BOTH_USD_PER_H)
    assert stopped["usd"] == pytest.approx(stopped["hours"] * BOTH_USD_PER_H, rel=0.05)
    spent = attempt_cost(view.events())
    assert spent.usd == pytest.approx(spent.hours * BOTH_USD_PER_H)


def test_a_budget_of_both_stops_both_and_a_higher_one_ends_the_run_unchanged(
    recipe: Path,  # noqa: F811
    checkpoints: str,  # noqa: F811
) -> None:
    """The last step is committed with the parts of both nodes. No step is repeated and none is lost."""
    view = RunView(checkpoints, "limited")
    logs = both_stop(recipe, checkpoints, {BUDGET_USD: str(BUDGET)})
    last = view.events("step")[-1]["step"]
    newest = committed(view.bucket)[0]
    assert newest.step == last
    assert {"of-rank-0.bin", "of-rank-1.bin"} <= {file.path for file in newest.files}
    (stopped,) = view.events("stopped")
    assert (stopped["what"], stopped["limit"]) == ("budget", BUDGET)
    assert f"stopped at step {last}; run again with a higher budget to resume" in stopped["message"]
    assert [event["share"] for event in view.events("limit")] == [0.8, 1.0]
    assert not view.events("notice", "preempted", "failed")
    assert "exit code 79" in logs[1]
    assert Reader(view.bucket, "limited").read().state == "stopped"
    assert_dollars_of_both(view)

    both_stop(recipe, checkpoints, {BUDGET_USD: str(BUDGET)})
    again = [event["kind"] for event in view.events() if event["attempt"] == 2]
    assert again == ["claimed", "limit", "stopped"]

    with nodes(recipe, checkpoints, "limited", extra={**PRICED, BUDGET_USD: str(100 * BUDGET)}) as both:
        assert [node.wait(60) for node in both] == [ExitCode.DONE] * 2, both[0].log + both[1].log
    assert [event["step"] for event in view.events("restored")] == [0, last]  # attempts 1 and 3
    assert all(len(events) == 1 for events in view.steps().values())
    assert_alike(view, finish(recipe, checkpoints, "whole"))


@pytest.mark.parametrize(
    "limits", [{DEADLINE_H: "0.000001"}, {BUDGET_USD: "0.000001"}], ids=["deadline", "budget"]
)
def test_a_used_up_limit_starts_neither_node(recipe: Path, checkpoints: str, limits: dict[str, str]) -> None:  # noqa: F811
    """Node 0 detects it at its claim and tells node 1, which logs that node 0 has ended the attempt."""
    logs = both_stop(recipe, checkpoints, limits)
    view = RunView(checkpoints, "limited")
    assert view.events("stopped")
    assert not view.events("started")
    assert "used up" in logs[0]
    assert "node 0 has ended the attempt" in logs[1]

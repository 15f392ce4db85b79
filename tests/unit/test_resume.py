"""`submit --resume RUN` reuses the run's recipe, bucket, place and limits; runs with used-up limits are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cloud.fake import FakeCloud
from launcher.cloud.local import ended_phase
from launcher.local.progress import LineView
from launcher.registry import submitted
from launcher.registry.submitted import StartedRun
from launcher.runs.limits import changed_limits_note, current_limits, refuse_used_up
from launcher.runs.run import AttemptHistory, RunHistory
from launcher.submit.follow import SubmitContext
from launcher.submit.launch import submit
from launcher.submit.outcome import EXIT_CODES, judge
from launcher.submit.prepare import SubmitOptions, prepare
from launcher.submit.resume import resume
from launcher.submit.status import table
from tests.fakes.runs import attempt_events, write_commit, write_events
from tests.unit.test_orders import _no_settings, order, shipped  # noqa: F401 (a fixture, used by being there)
from tests.unit.test_submit import standing
from trainer.accounting import Limits
from trainer.errors import UserError
from trainer.events import Event
from trainer.options import BUDGET_USD, DEADLINE_H
from trainer.recipe import load, names

TINY = "zephyr-tiny/dpo"
NOW = datetime(2026, 1, 2, tzinfo=UTC)
NOTHING: dict[str, Any] = {
    "gpus": None, "nodes": None, "spot": None, "managed": False, "infra": (), "image": None, "checkpoints": None,
    "name": None, "retry_until_up": False, "budget": None, "deadline": None, "rows": None,
}  # fmt: skip
STOPPED: Event = {"kind": "stopped", "what": "budget", "limit": 10.0, "message": "budget used up"}


def stopped_events(*, usd_per_h: float = 3600.0) -> list[Event]:
    """Return events of 20 steps of one second at $1 per second, with a budget of $30."""
    events = attempt_events(1, start=0, last=20, total_steps=40, end={**STOPPED, "limit": 30.0})
    price = {"usd_per_h": usd_per_h, "market": "spot", "cloud": "gcp", "region": "us-central1"}
    events[0] |= {"price": price, "limits": {"budget_usd": 30.0, "deadline_h": 48.0}}
    return events


class Site:
    """A bucket with a stopped run, and a machine that may have a record of it."""

    def __init__(self, root: Path) -> None:
        self.runs, self.state = root / "runs", root / "state"
        self.recipe = load(TINY, ["learning_rate=3e-6"]).recipe
        write_events(self.runs / "r", stopped_events())
        write_commit(self.runs / "r", "step-00000020")
        record = {"recipe": self.recipe.model_dump(mode="json"), "recipe_digest": self.recipe.digest()}
        (self.runs / "r" / "run.json").write_text(json.dumps(record))

    def remember(self, **options: Any) -> None:
        sent = StartedRun(
            run_id="r", recipe=TINY, checkpoints=str(self.runs), kind="managed job", name="r", job_id=1,
            where="A100:8 spot on gcp", usd_per_h=1.0, submitted=1.0, options=options,
        )  # fmt: skip
        submitted.remember(self.state, sent)

    def resume(self, **given: Any) -> tuple[str, dict[str, Any]]:
        return resume("r", {**NOTHING, **given}, state=self.state, environ={})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_data_that_was_copied_to_the_nodes_is_found_here_again(site: Site, tmp_path: Path) -> None:
    """The run's recipe names the copy on the node; the record has the path on this machine."""
    data, there = tmp_path / "pairs.jsonl", tmp_path / "node" / ".aeolus" / "data" / "0" / "pairs.jsonl"
    there.parent.mkdir(parents=True)
    for path in (data, there):
        path.write_text("{}\n")
    recipe = load(TINY, [f"dataset_mixture={there}"]).recipe
    there.unlink()
    record = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest()}
    (site.runs / "r" / "run.json").write_text(json.dumps(record))
    site.remember()
    sent = submitted.recall(site.state, "r", str(site.runs))
    assert sent
    mounts = {"~/.aeolus/data/0/pairs.jsonl": str(data)}
    submitted.remember(site.state, sent.model_copy(update={"mounts": mounts}))
    path, _options = site.resume()
    assert [each.id for each in load(path).recipe.dataset_mixture.datasets] == [str(data)]


@pytest.mark.parametrize("name", names())
def test_every_recipe_comes_back_from_its_run_json(name: str, tmp_path: Path) -> None:
    """The digest is the same, so it is the same run."""
    recipe = load(name).recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.as_flat()))
    assert load(path).recipe.digest() == recipe.digest()
    assert load(path).recipe.name == recipe.name


def test_a_run_goes_on_where_and_as_it_was_submitted(site: Site) -> None:
    """Recipe and limits come from the bucket, the place from the record. Given options override both."""
    site.remember(gpus="A100:8", infra=["gcp"], spot=True, managed=False, nodes=None)
    recipe, options = site.resume(budget=300.0)
    assert load(recipe).recipe.digest() == site.recipe.digest()
    assert Path(recipe).name == "dpo.yaml"
    assert options["checkpoints"] == str(site.runs)
    assert (options["name"], options["budget"], options["deadline"]) == ("r", 300.0, 48.0)
    assert (options["gpus"], options["infra"], options["spot"]) == ("A100:8", ("gcp",), True)
    assert site.resume(gpus="H100:8", budget=300.0)[1]["gpus"] == "H100:8"


def test_a_run_that_this_machine_never_saw_is_found_by_its_bucket(site: Site) -> None:
    """Its limits apply until others are given."""
    _recipe, options = site.resume(checkpoints=str(site.runs))
    assert (options["budget"], options["deadline"], options["gpus"]) == (30.0, 48.0, None)


def test_an_unknown_run_is_refused(site: Site) -> None:
    """The error names the address."""
    with pytest.raises(UserError, match=r"no run r in .*elsewhere"):
        site.resume(checkpoints=str(site.runs / "elsewhere"))


def test_the_same_run_whatever_its_limits(site: Site) -> None:
    """Budget and deadline change the task's environment, but no name."""
    free, limited = order(gpus="A100-80GB:8"), order(gpus="A100-80GB:8", budget_usd=200.0, deadline_h=36.0)
    assert free.launch.name == limited.launch.name
    assert free.launch.run_id == limited.launch.run_id
    envs = limited.launch.task["envs"]
    assert (envs[BUDGET_USD], envs[DEADLINE_H]) == ("200", "36")
    assert not {BUDGET_USD, DEADLINE_H} & free.launch.task["envs"].keys()


def test_machines_of_one_s_own_take_a_deadline_and_with_a_price_a_budget() -> None:
    """A budget applies only with a price."""
    there = {"gpus": "A100:8", "infra": ("slurm",)}
    assert order(TINY, **there, deadline_h=2.0).launch.task["envs"][DEADLINE_H] == "2"
    priced = order(TINY, **there, budget_usd=5.0, environ={"AEOLUS_USD_PER_H": "2"})
    assert priced.launch.task["envs"][BUDGET_USD] == "5"
    assert BUDGET_USD not in order(TINY, **there, environ={"AEOLUS_BUDGET": "5"}).launch.task["envs"]


@pytest.mark.parametrize(("budget", "refused"), [(10.0, True), (30.0, True), (31.0, False), (None, False)])
def test_nothing_is_rented_for_a_budget_that_is_spent(
    budget: float | None, refused: bool, site: Site
) -> None:
    """The attempt would stop at once. With a higher budget it is launched."""
    made = prepare(
        SubmitOptions(
            source=TINY, checkpoints="gs://b/r", gpus="A100:8", infra=("slurm",), name="r", budget_usd=budget
        ),
        environ={"AEOLUS_USD_PER_H": "1"},
        now=NOW,
        prices=shipped,
    )
    mine = replace(made, launch=replace(made.launch, checkpoints=str(site.runs)))
    cloud = FakeCloud(ends="failed")
    desk = SubmitContext(
        backend=cloud, state=site.state, view=LineView(lambda _line: None), now=NOW.timestamp
    )
    if refused:
        with pytest.raises(UserError, match="has used up its budget") as caught:
            submit(mine, desk, detach=True)
        assert "--resume r --budget N" in str(caught.value)
        assert not cloud.launched
        return
    submit(mine, desk, detach=True)
    assert len(cloud.launched) == 1
    remembered = submitted.recall(site.state, "r", str(site.runs))
    assert remembered
    assert (remembered.options["gpus"], remembered.options["infra"]) == ("A100:8", ["slurm"])


def run_of(*attempts: list[Event]) -> RunHistory:
    return RunHistory(
        "r", "uri", tuple(AttemptHistory(n, tuple(events)) for n, events in enumerate(attempts, 1)), (20,)
    )


def test_a_run_at_work_keeps_its_limits_and_says_so() -> None:
    """The limits of a running supervisor cannot be changed."""
    run = run_of(stopped_events())
    assert current_limits(run) == Limits(budget_usd=30.0, deadline_h=48.0)
    assert changed_limits_note(run, Limits(budget_usd=30.0, deadline_h=48.0)) is None
    assert "launcher cancel r" in str(changed_limits_note(run, Limits(budget_usd=300.0)))
    assert current_limits(run_of(attempt_events(1, start=0, last=1, total_steps=2))) == Limits()
    assert changed_limits_note(run_of(), Limits(budget_usd=1.0)) is None


def test_a_passed_deadline_is_refused_by_the_clock() -> None:
    """The deadline counts from the first claim."""
    run = run_of(attempt_events(1, start=0, last=1, total_steps=2))
    refuse_used_up(run, Limits(deadline_h=25), now=NOW)
    with pytest.raises(UserError, match="used up its deadline"):
        refuse_used_up(run, Limits(deadline_h=24), now=NOW)


def test_a_stopped_run_is_neither_failed_nor_recovered(site: Site) -> None:
    """Exit code 79 means `stopped`, although SkyPilot calls it a failure."""
    run = run_of(stopped_events())
    assert run.state == "stopped"
    failed = standing("failed")
    local = standing(ended_phase(79, cancelled=False), kind="local", exit_code=79)
    assert judge(failed, run) == "stopped"
    assert judge(failed, run, attempts_before=1) == "failed"
    assert judge(local, run) == "stopped"
    assert EXIT_CODES["stopped"] == 79
    site.remember()
    cloud = FakeCloud()
    cloud.statuses["managed job", "r"] = failed.model_copy(update={"name": "r"})
    (row,) = table(site.state, cloud, now=NOW.timestamp())
    assert row["state"] == "stopped"

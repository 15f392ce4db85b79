"""SkyPilot's task as a value, compared as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from launcher.plan.rank import Plan
from launcher.submit.task import Candidate, TaskSpec, candidates, cloud_name, task_config, to_yaml
from tests.unit.test_plan import planned
from trainer.errors import RecipeError, UserError

BASE: dict[str, Any] = {
    "name": "dpo-full",
    "envs": {
        "RECIPE": "zephyr-7b/dpo_full",
        "CHECKPOINTS": "gs://YOUR-BUCKET/runs",
        "OVERRIDES": "",
        "RUN": "",
    },
    "secrets": {"HF_TOKEN": "", "AWS_ACCESS_KEY_ID": ""},
    "resources": {
        "disk_size": 512,
        "job_recovery": {"recover_on_exit_codes": [75]},
        "ordered": [
            {"infra": "gcp", "accelerators": "A100-80GB:8", "use_spot": True, "disk_tier": "best"},
            {"infra": "lambda", "accelerators": "A100-80GB:8", "use_spot": False},
        ],
    },
    "workdir": ".",
    "setup": "echo set up\necho done\n",
    "run": "exec python\n",
}
SPOT = Candidate(infra="gcp", accelerators="A100:8", use_spot=True, instance_type="a2-highgpu-8g")
LAMBDA = Candidate(infra="lambda", accelerators="A100:8", use_spot=False, instance_type="gpu_8x_a100")


def request(**given: object) -> TaskSpec:
    some = {
        "run_id": "a-run",
        "recipe": "zephyr-7b/dpo_full",
        "checkpoints": "gs://b/runs",
        "candidates": (SPOT,),
    }
    return TaskSpec.model_validate({**some, **given})


def test_a_request_is_the_whole_task() -> None:
    """Only the place, the run and its name change in a task of jobs/."""
    asked = request(
        overrides=("learning_rate=1e-6", "save_steps=20"),
        candidates=(SPOT, LAMBDA),
        secrets=("HF_TOKEN",),
        workdir="/src",
        image="registry/aeolus-trainer:1",
        nodes=2,
    )
    assert task_config(BASE, asked) == {
        "name": "a-run",
        "envs": {
            "RECIPE": "zephyr-7b/dpo_full",
            "CHECKPOINTS": "gs://b/runs",
            "OVERRIDES": "learning_rate=1e-6 save_steps=20",
            "RUN": "a-run",
        },
        "secrets": {"HF_TOKEN": None},
        "num_nodes": 2,
        "resources": {
            "disk_size": 512,
            "job_recovery": {"recover_on_exit_codes": [75]},
            "image_id": "docker:registry/aeolus-trainer:1",
            "ordered": [
                {
                    "infra": "gcp",
                    "accelerators": "A100:8",
                    "use_spot": True,
                    "instance_type": "a2-highgpu-8g",
                    "disk_tier": "best",
                },
                {
                    "infra": "lambda",
                    "accelerators": "A100:8",
                    "use_spot": False,
                    "instance_type": "gpu_8x_a100",
                },
            ],
        },
        "workdir": "/src",
        "setup": "echo set up\necho done\n",
        "run": "exec python\n",
    }


def test_one_place_needs_no_list_and_slurm_hears_nothing_of_spot() -> None:
    """SkyPilot's Slurm refuses `use_spot`, even if it is false."""
    own = Candidate(infra="slurm", accelerators="A100:8", use_spot=None)
    config = task_config(BASE, request(candidates=(own,), node_python="/opt/python"))
    assert config["resources"] == {
        "disk_size": 512,
        "job_recovery": {"recover_on_exit_codes": [75]},
        "infra": "slurm",
        "accelerators": "A100:8",
    }
    assert config["envs"]["AEOLUS_TRAINER_PYTHON"] == "/opt/python"
    assert not {"secrets", "workdir", "num_nodes"} & set(config)


def test_a_forgotten_cluster_goes_down_by_itself() -> None:
    """An idle machine must not cost money."""
    resources = task_config(BASE, request(autostop=True))["resources"]
    assert resources["autostop"] == {"idle_minutes": 10, "down": True}


def test_the_base_is_left_as_it_was() -> None:
    """A second submission in the same process starts from the same task."""
    before = yaml.safe_dump(BASE)
    task_config(BASE, request(overrides=("beta=0.1",), secrets=("HF_TOKEN",), autostop=True))
    assert yaml.safe_dump(BASE) == before


def test_the_file_of_a_dry_run_is_the_task() -> None:
    """The printed task can be launched by hand, and its scripts are readable."""
    config = task_config(BASE, request(candidates=(SPOT, LAMBDA), secrets=("HF_TOKEN",), workdir="/src"))
    text = to_yaml(config)
    assert yaml.safe_load(text) == config
    assert "setup: |\n  echo set up\n  echo done\n" in text
    assert text.startswith("name: a-run\nenvs:\n")


@pytest.mark.parametrize("word", ["run_name=my run", "a=*", "b='c'", 'd="e"'])
def test_an_override_that_the_shell_would_change_is_refused(word: str) -> None:
    """The node splits OVERRIDES at blanks, so an override with blanks is refused."""
    with pytest.raises(RecipeError, match="would change"):
        task_config(BASE, request(overrides=(word,)))


def test_a_task_that_is_not_ours_is_refused() -> None:
    """Without our variables the node would train something else."""
    with pytest.raises(UserError, match="has no variable OVERRIDES, RUN"):
        task_config({"name": "x", "envs": {"RECIPE": "a", "CHECKPOINTS": "b"}}, request())


@pytest.mark.parametrize(
    ("run_id", "name"),
    [("zephyr-7b-dpo_full-1a2b", "zephyr-7b-dpo_full-1a2b"), ("7b", "run-7b"), ("a.", "a"), ("a-_", "a")],
)
def test_every_run_id_has_a_name_that_skypilot_takes(run_id: str, name: str) -> None:
    """The name starts with a letter and ends with a letter or a digit."""
    assert cloud_name(run_id) == name


def _places(found: Plan, *, managed: bool, **given: Any) -> list[Candidate]:
    return list(candidates(found, managed=managed, **{"asked": ("gcp", "lambda"), **given}))


def test_candidates_are_the_plan_s_rows_in_its_order() -> None:
    """SkyPilot tries the plan's choice, then the plan's next rows."""
    found = planned(accelerator="A100", count=8)
    places = _places(found, managed=True, named=True)
    assert [(each.infra, each.use_spot) for each in places] == [
        (row.offer.infra, row.spot) for row in found.rows
    ]
    assert {each.accelerators for each in places} == {"A100:8"}
    assert {each.instance_type for each in places} == {"a2-highgpu-8g", "gpu_8x_a100"}


def test_without_recovery_there_is_no_spot() -> None:
    """A lost cluster is not replaced."""
    assert not any(each.use_spot for each in _places(planned(spot=False), managed=False))
    assert not any(each.use_spot for each in _places(planned(), managed=False, named=True))


def test_a_fallback_may_not_cost_much_more() -> None:
    """A fallback costs at most twice as much as the choice, and there are few of them."""
    found = planned()
    places = _places(found, managed=True)
    limit = 2 * found.rows[0].usd
    assert len(places) == 6
    dear = [row for row in found.rows if row.usd > limit]
    assert dear
    names = {(each.instance_type, each.use_spot) for each in places}
    assert not names & {(row.offer.instance_type, row.spot) for row in dear}


def test_a_region_that_was_asked_for_is_kept() -> None:
    """Without a region, SkyPilot tries all regions of a cloud, the cheapest first."""
    found = planned(accelerator="A100", count=8, spot=True)
    (place,) = _places(found, managed=True, asked=("gcp/us-central1",))
    assert place.infra.startswith("gcp/")

"""Every shipped task is what SkyPilot accepts, and what it would rent for it is the cheapest that our prices have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from launcher.cloud.protocol import CatalogRow
from launcher.prices.store import SNAPSHOT
from tests.harness import ROOT
from trainer.recipe import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.e2e.lab.lab import Lab

JOBS = ROOT / "jobs"
SINGLE = {
    "dpo_full": "A100-80GB:8",
    "sft_full": "A100-80GB:8",
    "dpo_full_offload": "A100:8",
    "dpo_qlora": "A100:1",
    "sft_qlora": "A100:1",
    "dpo_lora": "A100:1",
    "dpo_full_multinode": "A100-80GB:8",
}
"""Tasks, and the GPUs of each of their nodes that are tried first."""
PIPELINE = "zephyr"
DRY = ("launch", "--dryrun", "--yes", "-i", "10", "--down", "--env", "CHECKPOINTS=gs://a-bucket/runs")
SECRETS = {"HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


class Choice(NamedTuple):
    """What SkyPilot would rent, as the line of its table says it."""

    infra: str
    instance_type: str
    gpus: str
    usd_per_h: float


def documents(task: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((JOBS / f"{task}.yaml").read_text()))


def tasks() -> list[tuple[str, dict[str, Any]]]:
    """Each task of each file."""
    found = [
        (path.stem, document) for path in sorted(JOBS.glob("*.yaml")) for document in documents(path.stem)
    ]
    return [(name, document) for name, document in found if "run" in document]


def test_every_file_is_a_task_that_is_tried_here() -> None:
    """A task that is added to `jobs/` has to be added to these tests."""
    assert {path.stem for path in JOBS.glob("*.yaml")} == {*SINGLE, PIPELINE}


@pytest.mark.parametrize("task", [*SINGLE, PIPELINE])
def test_the_header_has_the_commands(task: str) -> None:
    """A person reads at the top of the file what to type."""
    header = (JOBS / f"{task}.yaml").read_text().split("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"sky jobs launch jobs/{task}.yaml --env CHECKPOINTS=" in header
    by_hand = f"sky launch -c {task.replace('_', '-')} jobs/{task}.yaml --env CHECKPOINTS=gs://BUCKET/runs -i 10 --down"
    assert by_hand in header or task == PIPELINE


@pytest.mark.parametrize(("task", "document"), tasks())
def test_only_the_recoverable_exit_code_is_recovered(task: str, document: dict[str, Any]) -> None:
    """75 means `run it again`; any other failure would only fail again."""
    assert document["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}


@pytest.mark.parametrize(("task", "document"), tasks())
def test_tokens_are_secrets_and_none_is_needed(task: str, document: dict[str, Any]) -> None:
    """SkyPilot redacts secrets; an empty one is given, so that a launch without it is no error."""
    assert document["secrets"].keys() >= SECRETS
    assert not document["secrets"].keys() & document["envs"].keys()
    assert set(document["secrets"].values()) == {""}
    assert document["envs"]["CHECKPOINTS"] is None, "SkyPilot is to ask for it"


@pytest.mark.parametrize(("task", "document"), tasks())
def test_lambda_is_asked_for_what_it_has(task: str, document: dict[str, Any]) -> None:
    """Lambda has no spot and no choice of disks; SkyPilot refuses an entry that asks for one."""
    entries = document["resources"]["ordered"]
    [of_lambda] = [entry for entry in entries if entry.get("infra") == "lambda"]
    assert of_lambda["use_spot"] is False
    assert "disk_tier" not in of_lambda
    assert "infra" not in entries[-1], "the last entries take whatever cloud has room"


@pytest.mark.parametrize(("task", "document"), tasks())
def test_the_recipe_is_a_shipped_one(task: str, document: dict[str, Any]) -> None:
    """The recipe that a task names loads."""
    [recipe] = [value for name, value in document["envs"].items() if name.endswith("RECIPE")]
    assert load(recipe).recipe


@pytest.fixture(scope="module")
def rented(lab: Lab) -> dict[str, list[Choice]]:
    """What SkyPilot's optimizer takes for each task of each file."""
    lab.sky.pretend("GCP", "Lambda")
    files = [JOBS / f"{name}.yaml" for name in (*SINGLE, PIPELINE)]
    return {
        file.stem: [shown(task) for task in tasks]
        for file, tasks in zip(files, lab.sky.chosen(files), strict=True)
    }


@pytest.mark.parametrize("task", SINGLE)
def test_skypilot_would_rent_the_cheapest_spot_machine(task: str, rented: dict[str, list[Choice]]) -> None:
    """Its optimizer takes the first entry, in the region that our price snapshot has as the cheapest."""
    nodes = documents(task)[0].get("num_nodes", 1)
    [choice] = rented[task]
    assert choice in cheapest("gcp", SINGLE[task], nodes=nodes)


def test_both_halves_of_the_pipeline_would_be_rented(rented: dict[str, list[Choice]]) -> None:
    """SkyPilot plans the pipeline as two tasks, one after the other."""
    sft, dpo = rented[PIPELINE]
    assert sft in cheapest("gcp", "A100-80GB:8")
    assert dpo == sft


@pytest.mark.parametrize(
    ("clouds", "infra"), [(("GCP", "Lambda"), "gcp"), (("Lambda",), "lambda")], ids=["gcp", "lambda"]
)
def test_a_dry_run_by_hand_says_so(clouds: tuple[str, ...], infra: str, lab: Lab) -> None:
    """`sky launch --dryrun` of a shipped task; without Google it takes a later entry, Lambda's on demand."""
    lab.sky.pretend(*clouds)
    said = lab.sky.run(*DRY, JOBS / "dpo_full.yaml")
    assert "Dryrun finished" in said
    [choice] = chosen(said)
    assert choice in cheapest(infra, "A100-80GB:8")


def shown(task: dict[str, Any]) -> Choice:
    """A choice of SkyPilot's optimizer, as its table has it."""
    [(name, count)] = task["gpus"].items()
    place = {"gcp": "GCP ({region}-a)", "lambda": "Lambda ({region})"}[task["infra"]].format(**task)
    machine = f"{task['instance_type']}{'[Spot]' * task['spot']}"
    return Choice(place, machine, f"{name}:{count}", round(task["usd_per_h"], 2))


def chosen(said: str) -> list[Choice]:
    """What SkyPilot's tables have marked, a task each."""
    marked = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said.splitlines() if "✔" in line]
    cells = [re.split(r"\s{2,}", line)[:6] for line in marked]
    return [Choice(infra, instance, gpus, float(cost)) for infra, instance, _, _, gpus, cost in cells]


def cheapest(infra: str, gpus: str, *, nodes: int = 1) -> list[Choice]:
    """What the snapshot says, as SkyPilot writes it: of regions at one price it may take any."""
    name, count = gpus.split(":")
    rows = [CatalogRow(*row) for row in json.loads(Path(SNAPSHOT).read_text())["rows"]]
    alike = [row for row in rows if (row.infra, row.accelerator, row.gpus) == (infra, name, int(count))]
    spot = infra == "gcp"
    prices = {row: (row.spot_usd_per_h if spot else row.usd_per_h) or float("inf") for row in alike}
    least = min(prices.values())
    return [
        Choice(
            f"GCP ({row.region}-a)" if spot else f"Lambda ({row.region})",
            f"{row.instance_type}{'[Spot]' * spot}",
            gpus,
            round(nodes * price, 2),
        )
        for row, price in prices.items()
        if price == least
    ]

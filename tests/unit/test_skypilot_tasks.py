"""Our tasks and our expectations are checked by SkyPilot itself, without sending anything."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cloud.skypilot import JOB_FIELDS
from launcher.cloud.skypilot_errors import ABSENT, KNOWN
from launcher.cloud.skypilot_records import PHASES
from launcher.submit.task import cloud_name
from tests.e2e.lab import catalogs
from tests.unit.test_orders import order
from trainer.recipe import default_run_id, load, names

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_0123456789"
SCRIPT = """
import inspect, json, sys
from launcher.cloud import skypilot
orders = json.load(sys.stdin)
told = {}
with skypilot._asking("look") as sky:
    for name, (config, secrets) in orders.items():
        task = skypilot._task(sky, config, secrets)
        shown = json.dumps(task.to_yaml_config(use_user_specified_yaml=True))
        told[name] = {"resources": [f"{each} in {each.region}" for each in task.resources], "shown": shown, "nodes": task.num_nodes}
    from sky.schemas.api import responses
    from sky.skylet import constants
    from sky.utils import status_lib
    functions = {"launch": sky.launch, "jobs.launch": sky.jobs.launch, "queue_v2": sky.jobs.queue_v2,
        "jobs.tail_logs": sky.jobs.tail_logs, "jobs.cancel": sky.jobs.cancel, "status": sky.status,
        "job_status": sky.job_status, "tail_logs": sky.tail_logs, "cancel": sky.cancel, "down": sky.down,
        "stream_and_get": sky.stream_and_get, "get": sky.get}
    facts = {
        "functions": {name: list(inspect.signature(each).parameters) for name, each in functions.items()},
        "exceptions": dir(sky.exceptions),
        "statuses": [each.value for each in (*sky.ManagedJobStatus, *sky.JobStatus)],
        "fields": list(responses.ManagedJobRecord.model_fields),
        "cluster": list(responses.StatusResponse.model_fields),
        "pattern": constants.CLUSTER_NAME_VALID_REGEX,
    }
try:
    skypilot.accepts({**config, "resource": {}}, {})
    facts["refused"] = None
except skypilot.UserError as error:
    facts["refused"] = str(error)
import pathlib, yaml
facts["shipped"] = {}
for path in pathlib.Path(skypilot.__file__).parents[2].glob("jobs/*.yaml"):
    for document in yaml.safe_load_all(path.read_text()):
        if "run" in document:
            try:
                skypilot.accepts(document, {})
                facts["shipped"][f"{path.stem} {document['name']}"] = None
            except skypilot.UserError as error:
                facts["shipped"][f"{path.stem} {document['name']}"] = str(error)
print(json.dumps({"tasks": told, "facts": facts}))
"""
ORDERS: dict[str, dict[str, Any]] = {
    "whatever the plan chooses": {},
    "gpus": {"gpus": "A100:8"},
    "spot": {"gpus": "A100-80GB:8", "spot": True},
    "a region": {"gpus": "A100:8", "infra": ("gcp/us-central1",)},
    "on demand": {"gpus": "A100-80GB:8", "spot": False, "image": "registry.example/aeolus:1"},
    "two nodes": {"gpus": "A100:8", "nodes": 2},
    "an adapter": {"source": "dpo_qlora"},
    "slurm": {"source": "zephyr-tiny/dpo", "gpus": "A100:8", "infra": ("slurm",), "managed": True},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return SkyPilot's tasks for the submissions; SkyPilot is imported once for all tests."""
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not in this environment")
    home = tmp_path_factory.mktemp("home")
    catalogs.write(home / ".sky" / "catalogs" / "v8")
    secret = {"HF_TOKEN": SECRET}
    made = {name: order(**{"environ": secret, **given}) for name, given in ORDERS.items()}
    given = {name: (each.launch.task, dict(each.launch.secrets)) for name, each in made.items()}
    environ = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(given), capture_output=True, text=True, check=False, env=environ, cwd=home, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(
        ran.stdout
    )  # nothing but our line: what SkyPilot prints goes to stderr
    return result


@pytest.mark.parametrize("name", ORDERS)
def test_skypilot_takes_every_kind_of_order(told: dict[str, Any], name: str) -> None:
    """Its schema, clouds and catalogs accept the task, and the task's text has no secret."""
    task = told["tasks"][name]
    assert task["resources"]
    assert SECRET not in task["shown"]
    assert '"HF_TOKEN": null' in task["shown"]


def test_what_skypilot_reads_is_what_was_meant(told: dict[str, Any]) -> None:
    """SkyPilot reads the machine, market and GPUs of the first choice."""
    first = told["tasks"]["spot"]["resources"][0]
    assert "GCP(a2-ultragpu-8g[Spot]" in first
    assert "{'A100-80GB': 8}" in first
    assert told["tasks"]["two nodes"]["nodes"] == 2
    assert "Slurm" in told["tasks"]["slurm"]["resources"][0]
    assert "in us-central1" in told["tasks"]["a region"]["resources"][0]


def test_a_task_that_skypilot_refuses_is_text(told: dict[str, Any]) -> None:
    """An unknown key is a UserError."""
    assert "cannot check the task" in told["facts"]["refused"]


def test_a_shipped_task_without_its_bucket_is_refused_before_anything_is_rented(told: dict[str, Any]) -> None:
    """SkyPilot's error names the variable, before a machine is rented."""
    shipped = told["facts"]["shipped"]
    assert len(shipped) == 9
    assert all("'CHECKPOINTS' is None" in str(said) for said in shipped.values()), shipped


def test_the_faults_that_we_know_are_skypilot_s(told: dict[str, Any]) -> None:
    """Every class that we recognise exists in SkyPilot."""
    assert {*KNOWN, *ABSENT, "ResourcesUnavailableError"} <= set(told["facts"]["exceptions"])


def test_every_status_has_a_phase(told: dict[str, Any]) -> None:
    """A status that is not in the table is one of SkyPilot's failures."""
    statuses = set(told["facts"]["statuses"])
    assert set(PHASES) <= statuses
    assert all(status.startswith("FAILED") for status in statuses - set(PHASES))


def test_the_fields_that_we_ask_for_exist(told: dict[str, Any]) -> None:
    """SkyPilot would ignore an unknown field silently."""
    assert set(JOB_FIELDS) <= set(told["facts"]["fields"])
    used = {"name", "status", "resources_str", "init_status_reason", "launched_at", "cloud"}
    assert used <= set(told["facts"]["cluster"])


@pytest.mark.parametrize(
    ("function", "used"),
    [
        ("launch", {"cluster_name", "retry_until_up"}),
        ("jobs.launch", {"name"}),
        ("queue_v2", {"refresh", "fields"}),
        ("jobs.tail_logs", {"job_id", "follow", "controller", "tail", "output_stream"}),
        ("jobs.cancel", {"job_ids", "graceful"}),
        ("tail_logs", {"cluster_name", "job_id", "follow", "tail", "output_stream"}),
        ("cancel", {"cluster_name", "all"}),
        ("stream_and_get", {"request_id", "output_stream"}),
    ],
)
def test_the_functions_that_we_call_take_what_we_give(
    told: dict[str, Any], function: str, used: set[str]
) -> None:
    """The functions have the parameters that the adapter passes by name."""
    assert used <= set(told["facts"]["functions"][function])


def test_every_run_has_a_name_that_skypilot_takes(told: dict[str, Any]) -> None:
    """This holds for every shipped recipe."""
    for name in names():
        run_id = default_run_id(load(name).recipe)
        assert re.fullmatch(told["facts"]["pattern"], cloud_name(run_id))

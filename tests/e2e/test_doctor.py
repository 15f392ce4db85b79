"""`launcher doctor` with a real SkyPilot, its clouds, and a bucket on a local server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.lab.launcher import Launcher
from trainer.errors import ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.e2e.lab.lab import Lab

ASKED = ("doctor", "zephyr-tiny/dpo", "--infra", "slurm", "--infra", "gcp")


@pytest.fixture(scope="module")
def launcher(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """A launcher with the credentials of the bucket."""
    return Launcher(lab.inside, tmp_path_factory.mktemp("state"), lab.secrets)


@pytest.fixture(scope="module", autouse=True)
def only_slurm_afterwards(lab: Lab) -> Iterator[None]:
    """These tests make SkyPilot check its clouds again; afterwards it must find only the cluster."""
    yield
    lab.sky.pretend("Slurm", checked=True)


def test_the_json_reports_all_checks(lab: Lab, launcher: Launcher) -> None:
    """The JSON reports the server, the usable cluster, the unusable but optional GCP, and the bucket."""
    done = launcher.run(*ASKED, "--checkpoints", lab.checkpoints, "--json")
    output: dict[str, Any] = json.loads(done.stdout)
    assert output["ready"] is True
    found = {each["name"]: each for each in output["checks"]}
    assert found["SkyPilot's server"]["said"] == "answers"
    assert (found["slurm"]["status"], found["slurm"]["said"]) == ("ok", "enabled")
    assert (found["gcp"]["status"], found["gcp"]["needed"]) == ("missing", False)
    assert "gcloud auth application-default login" in found["gcp"]["said"]
    assert "sky check gcp" in found["gcp"]["hint"]
    assert found["bucket"]["said"] == f"{lab.checkpoints}: write, list, read and delete work"
    put = found["conditional put"]
    assert (put["status"], put["said"], put["needed"]) == (
        "failed",
        "the store ignores it",
        False,
    )  # rclone's S3
    assert lab.secrets["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr


def test_missing_requirements_are_exit_code_2(lab: Lab, launcher: Launcher) -> None:
    """With `--infra gcp` alone, missing GCP credentials and a missing bucket are exit code 2."""
    done = launcher.run("doctor", "--infra", "gcp", "--checkpoints", "s3://no-such-bucket/runs", check=False)
    assert done.returncode == ExitCode.USAGE
    assert done.stdout.splitlines()[-1] == "not ready: gcp, bucket"
    assert "no-such-bucket" in done.stdout

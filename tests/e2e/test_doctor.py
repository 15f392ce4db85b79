"""`launcher doctor` of a real SkyPilot, its clouds, and a bucket behind a socket."""

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
    """Of somebody who has the bucket."""
    return Launcher(lab.inside, tmp_path_factory.mktemp("state"), lab.secrets)


@pytest.fixture(autouse=True)
def believed(lab: Lab) -> Iterator[None]:
    """What is asked of SkyPilot here has it look again for clouds; other tests find the cluster alone."""
    yield
    lab.sky.pretend("Slurm")


def test_what_is_there_is_told_as_json(lab: Lab, launcher: Launcher) -> None:
    """The server answers, the cluster can be had, Google cannot and need not, the bucket is tried."""
    done = launcher.run(*ASKED, "--checkpoints", lab.checkpoints, "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["ready"] is True
    found = {each["name"]: each for each in told["checks"]}
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


def test_what_is_missing_ends_with_2(lab: Lab, launcher: Launcher) -> None:
    """Where Google alone would do, it is in the way, and so is a bucket that is not there."""
    done = launcher.run("doctor", "--infra", "gcp", "--checkpoints", "s3://no-such-bucket/runs", check=False)
    assert done.returncode == ExitCode.USAGE
    assert done.stdout.splitlines()[-1] == "not ready: gcp, bucket"
    assert "no-such-bucket" in done.stdout

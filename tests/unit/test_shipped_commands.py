"""What a shipped task runs on its machine, and what a cancellation asks of SkyPilot, with stand-ins for both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launcher.cloud.protocol import JobStatus
from launcher.cloud.skypilot import SkyPilot

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


def ran(task: dict[str, Any], folder: Path, **envs: str) -> tuple[list[str], dict[str, str]]:
    """The trainer's arguments and environment, when SkyPilot runs a task with these variables."""
    trainer = folder / "trainer"
    trainer.write_text(TRAINER.format(python=sys.executable))
    trainer.chmod(0o755)
    known = {
        **task["envs"],
        **task["secrets"],
        "CHECKPOINTS": "s3://b/runs",
        "AEOLUS_TRAINER_PYTHON": str(trainer),
    }
    known |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env={"PATH": "/usr/bin:/bin", **known, **envs},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    words, environ = json.loads(done.stdout)
    return words, environ


def test_the_second_task_of_a_pipeline_is_given_the_first_s_model(tmp_path: Path) -> None:
    """The first task's run is named as SkyPilot names the task; a secret that is empty is none."""
    _, sft, dpo = yaml.safe_load_all((ROOT / "jobs" / "zephyr.yaml").read_text())
    ids = {"SKYPILOT_TASK_IDS": "sft-id\ndpo-id", "AWS_REGION": "here"}
    words, environ = ran(sft, tmp_path, **ids, SFT_OVERRIDES="max_steps=1 seed=2")
    assert words == [
        "-m",
        "trainer",
        "run",
        sft["envs"]["SFT_RECIPE"],
        "--checkpoints",
        "s3://b/runs",
        "max_steps=1",
        "seed=2",
    ]
    assert environ["AWS_REGION"] == "here"
    assert not {"HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID"} & environ.keys()
    assert environ["MASTER_ADDR"] == "10.0.0.1"
    words, _ = ran(dpo, tmp_path, **ids)
    assert words[3:] == [
        dpo["envs"]["DPO_RECIPE"],
        "--checkpoints",
        "s3://b/runs",
        "model_name_or_path=s3://b/runs/sft-id/final",
    ]


@pytest.mark.parametrize(
    ("kind", "cloud", "asked"),
    [
        ("managed job", "gcp", ("jobs.cancel", {"job_ids": [7], "graceful": True})),
        ("managed job", "slurm", ("jobs.cancel", {"job_ids": [7], "graceful": False})),
        ("cluster", "gcp", ("cancel", "a-run", {"all": True})),
        ("cluster", "slurm", ("down", "a-run")),
    ],
)
def test_a_cancelled_job_is_sent_sigterm(
    kind: Any, cloud: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every cloud by the request that begins with SIGTERM there."""
    told: list[tuple[Any, ...]] = []

    def records(name: str) -> Any:
        return lambda *words, **options: told.append((name, *words, *([options] if options else [])))

    fake = SimpleNamespace(
        jobs=SimpleNamespace(cancel=records("jobs.cancel")),
        cancel=records("cancel"),
        down=records("down"),
        exceptions=SimpleNamespace(),
        stream_and_get=lambda *_, **__: None,
    )
    for name, module in {"sky": fake, "sky.jobs": fake.jobs, "sky.exceptions": fake.exceptions}.items():
        monkeypatch.setitem(sys.modules, name, module)
    status = JobStatus(kind=kind, name="a-run", job_id=7, phase="running", raw_status="RUNNING", cloud=cloud)
    SkyPilot().cancel(status, print)
    assert told == [asked]

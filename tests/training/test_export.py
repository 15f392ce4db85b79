"""From a run to a model for others, as a user does it; and two runs that share a reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.harness import ROOT, RunView, TrainerRun

RECIPE = """
method: dpo
init: tiny
tiny: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}}
dataset_mixture: {{datasets: [{{id: "generated:preferences"}}]}}
max_train_samples: 16
global_batch_size: 4
max_length: 96
max_steps: 40
save_steps: 20
bf16: false
beta: {beta}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and another with another beta, under FSDP 2."""
    work = tmp_path_factory.mktemp("export")
    for number, (beta, overrides) in enumerate(((0.1, ()), (0.5, ("engine=fsdp2",))), start=1):
        recipe = work / f"beta-{beta}.yaml"
        recipe.write_text(RECIPE.format(beta=beta))
        name, at = f"run-{number}", work / f"work-{number}"
        with TrainerRun(recipe, str(work / "runs"), name, at, overrides=overrides) as run:
            assert run.wait() == 0, run.log
    return work / "runs"


def exported(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", "export", *arguments],
        cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_another_run_computes_no_reference(runs: Path) -> None:
    """What the first has computed lies beside the runs, and is the second's too."""
    first, second = (RunView(str(runs), f"run-{number}").events("reference") for number in (1, 2))
    assert [event["computed"] for event in first] == [16]
    assert [event["computed"] for event in second] == [0]
    assert len(list(runs.glob("reference/*/*/run-*.json"))) == 2


def test_the_final_model_has_a_card(runs: Path) -> None:
    """Written by the supervisor, which knows the attempts."""
    header, body = (runs / "run-1" / "final" / "README.md").read_text().split("---\n", 2)[1:]
    assert yaml.safe_load(header)["tags"] == ["trl", "dpo", "aeolus"]
    assert "1 attempt, 0 recoveries" in body
    assert "| 40 |" in body


def test_a_checkpoint_is_exported(runs: Path, tmp_path: Path) -> None:
    """By its step, into a folder that is named; else the final model, here."""
    done = exported(str(runs / "run-1"), "--step", "20", "--into", "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "model")
    assert "step 20" in (tmp_path / "model" / "README.md").read_text()
    done = exported(str(runs / "run-1" / "final"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine, theirs = (
        load_file(each / "model.safetensors") for each in (tmp_path / "run-1-final", runs / "run-1" / "final")
    )
    assert all((mine[name] == theirs[name]).all() for name in theirs)


def test_a_checkpoint_of_fsdp_is_exported(runs: Path, tmp_path: Path) -> None:
    """The engine that the recipe names trains, says so, and leaves its config in the bucket. Its slices become one model."""
    assert RunView(str(runs), "run-2").events("started")[0]["fsdp"]["fsdp"] is True
    [config] = runs.glob("run-2/checkpoints/step-*40/*/fsdp.json")
    assert json.loads(config.read_text())["fsdp_config"]["version"] == 2
    [weights] = runs.glob("run-2/checkpoints/step-*40/*/*.safetensors")
    assert weights.name == "rank-00000.safetensors"
    done = exported(str(runs / "run-2"), "--step", "40", "--into", "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine, theirs = (
        load_file(each / "model.safetensors") for each in (tmp_path / "model", runs / "run-2" / "final")
    )
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run-1", "--step", "3"], "committed steps: 40, 20"),
        (["unknown-run"], "there is no run at"),
        (["run-1", "--into", "."], "exists already"),
    ],
)
def test_what_cannot_be_exported_is_said(
    runs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """With the way out, and the code of a mistake that a user can mend."""
    failed = exported(str(runs / arguments[0]), *arguments[1:], cwd=tmp_path)
    assert failed.returncode == 78
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr

"""If the Hub does not answer, the supervisor retries. Then a recovery is recovered again, and a new run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers.hub import Hub
from tests.unit.test_architecture_table import recipe
from trainer.architecture.lookup import HubAway
from trainer.bucket import Bucket, open_run
from trainer.bucket.attempts import claim
from trainer.errors import ExitCode, ModelError
from trainer.hardware import Shape
from trainer.supervisor.preemption import Notice
from trainer.supervisor.run import look_up_architecture

GPU = Shape(accelerator="A100", count=1, memory_gib=40.0, cores=8, host_memory_gib=80.0, node="test")
CONFIG = "/org/new/resolve/main/config.json"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return open_run(str(tmp_path / "runs"), "r")


def test_a_recovery_asks_again_and_is_recovered_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt found the model, so the recipe is right and the failure is temporary."""
    claim(bucket, {})
    with Hub() as hub:
        hub.paths[CONFIG] = 503
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(HubAway, match="answers 503") as caught:
            look_up_architecture(recipe("org/new"), GPU, bucket, Notice(), pauses_s=(0.0, 0.0))
    assert caught.value.exit_code == ExitCode.RECOVER
    assert len(hub.asked) == 3


def test_a_new_run_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name or the network may be wrong permanently, so the run must not rent machine after machine."""
    with Hub() as hub:
        hub.paths[CONFIG] = 503
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ModelError, match="answers 503") as caught:
            look_up_architecture(recipe("org/new"), GPU, bucket, Notice(), pauses_s=(0.0,))
    assert caught.value.exit_code == ExitCode.CONFIG


def test_a_missing_model_is_not_retried(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name is an error at once."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ModelError, match="neither"):
            look_up_architecture(recipe("org/new"), GPU, bucket, Notice(), pauses_s=(600.0,))

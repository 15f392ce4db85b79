"""Trainings that several tests look at are done once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="the trainer's environment is not here: make setup")

if TYPE_CHECKING:
    from tests.servers.hub_uploads import Hub
    from tests.training.jobs import Trained


def pytest_configure(config: pytest.Config) -> None:
    """Side by side, each process of pytest-xdist takes a core of its own: two trainings that both
    want all cores wait for each other most of the time.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The stack warns of itself; our own rule that warnings are errors is for our own code."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Trains a shipped recipe on the smallest model; the same words give the same training once only."""
    from tests.training.jobs import SMALL, make_job, train

    done: dict[tuple[str, ...], Trained] = {}

    def trained(name: str, *overrides: str) -> Trained:
        if (name, *overrides) not in done:
            work = tmp_path_factory.mktemp("job") / "work"
            done[name, *overrides] = train(make_job(work, name, *SMALL, *overrides))
        return done[name, *overrides]

    return trained


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, and a token for it. huggingface_hub reads its address when it is imported."""
    from tests.servers.hub_uploads import serve

    with serve() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield served

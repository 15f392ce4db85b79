"""The image of rented machines: named, built when it is needed, pulled with a login."""

from __future__ import annotations

import pytest

from launcher.image import builders
from launcher.image.builders import BuildOptions
from launcher.settings import Settings
from launcher.submit.node_inputs import Container, container, login
from launcher.submit.task import to_yaml
from tests.unit.test_orders import _no_settings, order  # noqa: F401 (a fixture)
from trainer.errors import UserError

PASSWORD = "pa55word"
LOGIN = {"SKYPILOT_DOCKER_USERNAME": "me", "SKYPILOT_DOCKER_PASSWORD": PASSWORD}


def test_an_image_is_the_one_that_is_named() -> None:
    """The option overrides the settings, which apply to rented machines only."""
    remembered = Settings(image="ghcr.io/me/aeolus-trainer:1")
    assert container("other:2", remembered, own=False) == Container("other:2")
    assert container(None, remembered, own=False) == Container(remembered.image)
    assert container(None, remembered, own=True) == Container()


def test_auto_is_this_checkouts_image_by_its_content() -> None:
    """Its name is known before it is built, so a dry run shows it and builds nothing."""
    made = container("auto", Settings(registry="ghcr.io/me"), own=False)
    assert made.build == BuildOptions(registry="ghcr.io/me", push=True)
    assert made.image == builders.image_name(made.build)
    assert made.image.startswith("ghcr.io/me/aeolus-trainer:")
    assert container(None, Settings(image="auto", registry="ghcr.io/me"), own=False) == made


def test_auto_wants_a_registry() -> None:
    """Rented machines cannot pull from this one."""
    with pytest.raises(UserError, match="no registry to push to") as refused:
        container("auto", Settings(), own=False)
    assert "registry = " in str(refused.value.hint)


def test_a_dry_run_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "ensure", None)
    made = order(gpus="A100:8", image="auto", environ={"AEOLUS_REGISTRY": "ghcr.io/me"})
    assert made.build == BuildOptions(registry="ghcr.io/me", push=True)
    assert made.launch.task["resources"]["image_id"] == f"docker:{builders.image_name(made.build)}"


def test_a_login_goes_along_as_secrets() -> None:
    """The registry is the image's unless another is named. The task file has no values."""
    made = order(gpus="A100:8", image="ghcr.io/me/aeolus-trainer:1", environ=LOGIN)
    assert made.launch.secrets == {**LOGIN, "SKYPILOT_DOCKER_SERVER": "ghcr.io"}
    assert set(made.launch.task["secrets"]) == set(made.launch.secrets)
    assert PASSWORD not in to_yaml(made.launch.task)
    assert (
        login("docker:x.io/i:1", {**LOGIN, "SKYPILOT_DOCKER_SERVER": "y.io"})["SKYPILOT_DOCKER_SERVER"]
        == "y.io"
    )


def test_without_an_image_no_login_goes_anywhere() -> None:
    assert login(None, LOGIN) == {}
    assert login("i:1", {}) == {}


def test_half_a_login_is_refused() -> None:
    """SkyPilot would start the machine and then fail to pull."""
    with pytest.raises(UserError, match="SKYPILOT_DOCKER_USERNAME without SKYPILOT_DOCKER_PASSWORD"):
        login("i:1", {"SKYPILOT_DOCKER_USERNAME": "me"})

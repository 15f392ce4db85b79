"""The image, for real: built with no Docker engine, pushed, read back, and trained in; then its ways to fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.image.spec import INPUTS
from tests.e2e.image.site import Container, Site, wheels
from tests.e2e.image.site import site as brought_up
from tests.e2e.jobs import FEW, SMALLEST
from tests.e2e.lab.namespace import NotToBeHad
from tests.harness import ROOT, RunView, TrainerRun, run_in_slices
from trainer.errors import UserError
from trainer.supervisor.workers import worker_python

pytestmark = pytest.mark.timeout(3600)  # a whole image from nothing; on two quiet cores some minutes

BASE = "localhost/plain-debian"
PYTHON = "/opt/aeolus/venv/bin/python"
RUN = "in-the-image"
SHORT = (*FEW, *SMALLEST, "max_steps=80", "save_steps=10", "eval_strategy=no")
ADAM = """
import shutil, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
assert not shutil.which("g++") and not shutil.which("ninja")
def stepped(kind, **options):
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(4099))
    weights.grad = torch.randn(4099)
    kind([weights], lr=0.1, weight_decay=0.01, **options).step()
    return weights.detach()
torch.testing.assert_close(stepped(DeepSpeedCPUAdam, adamw_mode=True), stepped(torch.optim.AdamW), atol=1e-5, rtol=1e-5)
print("alike")
"""
PACKAGES = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"].lower().replace("_", "-").replace(".", "-"): d.version for d in importlib.metadata.distributions()}))
"""
MODULES = """
import importlib, pkgutil, trainer
for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A plain Debian base and the means to build on it; skips with what cannot be had."""
    with ExitStack() as stack:
        try:
            here = stack.enter_context(brought_up())
            here.make_base(BASE)
        except NotToBeHad as error:
            pytest.skip(str(error))
        yield here


@pytest.fixture(scope="module")
def registry(site: Site) -> str:
    return site.registry("registry")


@pytest.fixture(scope="module")
def options(registry: str) -> list[str]:
    folder = wheels()
    torch = ["--wheels", str(folder)] if folder else ["--torch", "cpu"]
    return ["--builder", "podman", "--base", BASE, "--registry", registry, *torch]


@pytest.fixture(scope="module")
def made(site: Site, options: list[str]) -> dict[str, Any]:
    """The image, built from nothing and pushed, as `--json` tells of it."""
    done = site.build("--push", "--remember", "--json", *options)
    assert done.returncode == 0, done.stderr[-6000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture(scope="module")
def container(site: Site, made: dict[str, Any]) -> Container:
    """What the registry gives back, with a folder of this machine as the bucket."""
    (site.folder / "bucket").mkdir()
    return site.read_back(made["image"], f"{site.folder}/bucket:/bucket")


@pytest.fixture(scope="module")
def trained(site: Site, container: Container) -> RunView:
    """A run of the image's own trainer that lost its machine once, and ended."""
    command = [
        PYTHON,
        "-m",
        "trainer",
        "run",
        "zephyr-tiny/sft",
        *SHORT,
        "--checkpoints",
        "/bucket",
        "--run-id",
        RUN,
    ]
    inside = RunView(str(site.folder / "bucket"), RUN)
    with (site.folder / "run.log").open("wb") as log:
        first = container.start(*command, log=log)
        run_in_slices(
            lambda: _tree(first), lambda: inside.committed_steps() or first.poll() is not None, "a commit"
        )
        assert _kill(first) > 3, _tail(site.folder / "run.log")
        assert inside.final() is None
        assert container.start(*command, log=log).wait(900) == 0, _tail(site.folder / "run.log")
    return inside


def test_it_is_built_pushed_and_remembered(site: Site, made: dict[str, Any], registry: str) -> None:
    """One command makes the image where there is no engine, and `submit` knows it from then on."""
    assert made["built"]
    assert made["pushed"]
    assert made["image_id"] == f"docker:{registry}/aeolus-trainer:{made['digest'][:16]}"
    assert f'image = "{made["image"]}"' in Path(made["remembered_in"]).read_text()
    assert sum(layer["size_bytes"] for layer in made["layers"]) > 2**29


def test_the_same_again_does_nothing(site: Site, made: dict[str, Any], options: list[str]) -> None:
    """The registry has the tag, so nothing is built and nothing is pushed."""
    again = site.build("--push", *options)
    assert again.stdout == f"image_id: {made['image_id']}\n", again.stderr[-3000:]
    assert "nothing to do" in again.stderr


def test_it_has_the_pinned_packages_and_no_others(container: Container) -> None:
    """What was tested is what trains; no test tool, no launcher, no compiler comes along."""
    found = json.loads(container.run(PYTHON, "-c", PACKAGES))
    lines = (ROOT / "requirements" / "image.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if re.match(r"[a-z0-9._-]+==", line))
    pinned = {name.replace("_", "-").replace(".", "-"): version for name, version in pinned.items()}
    assert found.pop("torch").startswith("2.13.0")
    assert {name: version for name, version in found.items() if pinned.get(name) != version} == {}
    assert pinned.keys() == found.keys()


def test_all_of_the_trainer_can_be_imported(container: Container) -> None:
    """No module of it wants a package that only the checkout's environment has."""
    imported = set(container.run(PYTHON, "-c", MODULES).split())
    modules = {path for path in (ROOT / "trainer").rglob("*.py") if path.stem not in {"__init__", "__main__"}}
    assert imported >= {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules}


def test_offloaded_adam_needs_no_compiler(container: Container) -> None:
    """DeepSpeed's Adam for the CPU was compiled while the image was built, and steps as torch's does."""
    assert container.run(PYTHON, "-c", ADAM).endswith("alike\n")


def test_it_is_what_skypilot_asks_of_an_image(container: Container) -> None:
    """Root, bash, apt, and the tools that SkyPilot would install at every start; no host key of everybody's."""
    told = container.run(
        "bash", "-lc", "id -u; command -v apt-get curl wget rsync patch sudo pip3; ls /etc/ssh 2>&1 || :"
    )
    assert told.startswith("0\n")
    assert told.count("/bin/") == 7
    assert "ssh_host" not in told


def test_a_run_in_it_is_killed_and_ends_with_the_weights_of_a_run_outside(
    site: Site, trained: RunView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's own trainer, with no checkout near, resumes after SIGKILL to the same bits as here."""
    try:
        monkeypatch.setenv("AEOLUS_TRAINER_PYTHON", worker_python())
    except UserError as error:
        pytest.skip(str(error))
    recipe = ROOT / "jobs" / "recipes" / "zephyr-tiny" / "sft.yaml"
    bucket = str(site.folder / "outside")
    with TrainerRun(recipe, bucket, RUN, site.folder / "work", overrides=SHORT) as outside:
        assert outside.wait(900) == 0, outside.log
    here, there = RunView(bucket, RUN).final(), trained.final()
    assert here is not None
    assert there is not None
    assert there.weights_digest == here.weights_digest
    assert [event["step"] > 0 for event in trained.events("restored")] == [False, True]


def test_what_it_trained_is_exported_in_it(site: Site, container: Container, trained: RunView) -> None:
    """The image makes a model for others of a checkpoint, as the checkout does."""
    assert trained.final()
    container.run(PYTHON, "-m", "trainer", "export", f"/bucket/{RUN}", "--into", "/bucket/model")
    assert (site.folder / "bucket" / "model" / "model.safetensors").stat().st_size > 2**16
    assert (site.folder / "bucket" / "model" / "README.md").exists()


def test_a_change_in_the_trainer_rebuilds_one_small_layer(
    site: Site, made: dict[str, Any], options: list[str]
) -> None:
    """Another tag, and every layer but the last is the one that is there already."""
    with (site.checkout / "trainer" / "errors.py").open("a") as file:
        file.write("# changed\n")
    done = site.build("--push", "--json", *options)
    assert done.returncode == 0, done.stderr[-4000:]
    changed = json.loads(done.stdout)
    before, after = site.layers(made["image"]), site.layers(changed["image"])
    assert changed["image"] != made["image"]
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    assert changed["layers"][-1]["size_bytes"] < 10 * 2**20


def test_without_a_login_it_is_said_before_the_build(site: Site, options: list[str]) -> None:
    """The registry wants a login that podman has not: nothing is built for it, and nothing tagged."""
    host = site.registry("locked", locked=True)
    refused = site.build("--push", *options, "--registry", host)
    assert refused.returncode == 2
    assert f"podman login {host}" in refused.stderr
    assert "STEP" not in refused.stderr
    assert not list((site.folder / "locked").rglob("tags"))


def test_a_base_that_cannot_be_pulled_is_named(site: Site) -> None:
    """The message has the base, and the option that names another."""
    failed = site.build("--builder", "podman", "--base", "127.0.0.1:9/none", timeout_s=300)
    assert failed.returncode == 2
    assert "the base image 127.0.0.1:9/none cannot be pulled" in failed.stderr
    assert "--base" in failed.stderr


def test_a_full_disk_is_said_to_be_one(site: Site, options: list[str]) -> None:
    """A build that runs out of room names the disk, and the image is not there."""
    usual = site.inside.environ["CONTAINERS_STORAGE_CONF"]
    site.inside.environ["CONTAINERS_STORAGE_CONF"] = str(site.store("small", size="300m"))
    try:
        site.import_base(BASE)
        failed = site.build(*options, timeout_s=300)
    finally:
        site.inside.run("umount", "--recursive", site.folder / "small", check=False)
        site.inside.environ["CONTAINERS_STORAGE_CONF"] = usual
    assert failed.returncode == 2
    assert "the disk that podman uses is full" in failed.stderr


def test_what_the_checkout_gives_is_there(site: Site) -> None:
    """Every input of the image is in the copy that the tests build from."""
    assert all((site.checkout / name).exists() for name in INPUTS)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def _kill(process: Any) -> int:
    """SIGKILL to all of a container's processes, as a lost machine does; how many they were."""
    victims = _tree(process)
    for victim in victims:
        victim.suspend()  # none may start another, or end well, while its kin are killed
    victims += [victim for victim in _tree(process) if victim not in victims]
    for victim in reversed(victims):
        victim.kill()
    process.wait()
    psutil.wait_procs(victims, timeout=30)
    return len(victims)


def _tree(process: Any) -> list[psutil.Process]:
    try:
        whole = psutil.Process(process.pid)
        return [whole, *whole.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []

"""`requirements/install.sh` on a node: with what SkyPilot has put there, and no more."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.harness import ROOT

UV = """#!/bin/sh
echo "$@" >> "$HOME/asked"
mkdir -p mine
"""


def test_the_uv_that_skypilot_installs_is_taken(tmp_path: Path) -> None:
    """It is beside the PATH of a job's set-up, and a cloud's Ubuntu need not have `venv` to make another."""
    uv = tmp_path / "home" / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(UV)
    uv.chmod(0o755)
    (tmp_path / "requirements").mkdir()
    script = shutil.copy(ROOT / "requirements" / "install.sh", tmp_path / "requirements")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "touch", "mkdir"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        ["bash", script, "mine", "trainer"],
        env={"HOME": str(tmp_path / "home"), "PATH": str(tools), "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "venv --quiet --allow-existing --python 3.11 mine" in (tmp_path / "home" / "asked").read_text()
    assert not (tmp_path / ".tools").exists()


def test_both_environments_pin_the_same_versions_but_of_click() -> None:
    """Unit tests that need neither click nor the training packages therefore run in one environment only."""
    pins = [
        dict(
            re.findall(
                r"^([a-z0-9._-]+)==([^\s;]+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE
            )
        )
        for name in ("launcher.txt", "trainer.txt")
    ]
    shared = (
        "click",
        "obstore",
        "psutil",
        "pydantic",
        "pyyaml",
        "rich",
        "xxhash",
        "requests",
        "platformdirs",
    )
    assert [name for name in shared if pins[0][name] != pins[1][name]] == ["click"]

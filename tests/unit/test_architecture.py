"""The rules of the layout, as tests: who may import whom, and what a laptop command may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "bitsandbytes"}
CONTRACT = {
    "errors",
    "files",
    "recipe",
    "hardware",
    "memory",
    "fit",
    "estimate",
    "bucket",
    "events",
    "accounting",
    "metrics",
    "options",
    "architecture",
    "method",
}
"""What the launcher shares with the node; `job`, `staged` and `parent_death` are between supervisor and worker."""
DECIDES = (
    "trainer.fit.",
    "trainer.memory.",
    "trainer.estimate.",
    "launcher.plan.rank",
    "launcher.plan.spot",
    "launcher.submit.task",
)
IO = {"os", "io", "subprocess", "socket", "pathlib", "obstore", "psutil", "requests"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def below(name: str) -> str:
    """The module or package just below the top one: `recipe` of `trainer.recipe.model`."""
    return name.split(".")[1]


TRAINER = modules("trainer")
LAUNCHER = modules("launcher")
WORKER = [path for path in TRAINER if "worker" in path.parts]
NOT_WORKER = [path for path in TRAINER if path not in WORKER and path.stem != "generate_fields"]


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere in it or at its top level."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", TRAINER, ids=dotted)
def test_the_trainer_knows_neither_the_launcher_nor_skypilot(path: Path) -> None:
    """The container has neither, and a run must not depend on where it was asked for."""
    assert not roots(imports(path)) & {"launcher", "sky"}


@pytest.mark.parametrize("path", NOT_WORKER, ids=dotted)
def test_only_the_worker_needs_torch(path: Path) -> None:
    """The supervisor outlives a crash of torch, and the laptop has none."""
    assert not roots(imports(path)) & HEAVY
    assert not any(name.startswith("trainer.worker") for name in imports(path))


@pytest.mark.parametrize("path", WORKER, ids=dotted)
def test_the_worker_knows_no_bucket(path: Path) -> None:
    """Training stays what any program could be under the same supervisor."""
    assert not any(name.startswith(("trainer.bucket", "trainer.supervisor")) for name in imports(path))
    assert "obstore" not in roots(imports(path))


@pytest.mark.parametrize("path", [path for path in NOT_WORKER if below(dotted(path)) in CONTRACT], ids=dotted)
def test_the_contract_stands_on_its_own(path: Path) -> None:
    """The launcher can import it without the supervisor."""
    assert not any(name.startswith("trainer.supervisor") for name in imports(path))


@pytest.mark.parametrize(
    "path",
    [path for path in TRAINER if below(dotted(path)) in ("hardware", "memory", "estimate")],
    ids=dotted,
)
def test_what_a_fit_weighs_knows_nothing_of_the_fit(path: Path) -> None:
    """The fit asks memory and estimate, and memory asks neither: what a layout takes is the same whoever chose it."""
    above = {"hardware": ("memory", "estimate", "fit"), "memory": ("estimate", "fit"), "estimate": ("fit",)}
    known = {below(name) for name in imports(path) if name.startswith("trainer.")}
    assert not known & set(above[below(dotted(path))])


@pytest.mark.parametrize("path", LAUNCHER, ids=dotted)
def test_the_launcher_takes_only_the_contract_from_the_trainer(path: Path) -> None:
    """What the laptop shares with the node is the contract, never the supervisor or the worker."""
    assert {below(name) for name in imports(path) if name.startswith("trainer.")} <= CONTRACT


@pytest.mark.parametrize("path", LAUNCHER, ids=dotted)
def test_the_launcher_never_imports_torch_and_sky_in_one_file_only(path: Path) -> None:
    """`import sky` costs seconds, and its surprises stay in its adapter."""
    assert not roots(imports(path)) & HEAVY
    assert "sky" not in roots(imports(path, top_level=True))
    assert path.stem == "skypilot" or "sky" not in roots(imports(path))


@pytest.mark.parametrize("path", [p for p in TRAINER + LAUNCHER if dotted(p).startswith(DECIDES)], ids=dotted)
def test_what_decides_does_no_io(path: Path) -> None:
    """A decision is a function of its arguments, so the laptop and the node decide alike."""
    assert not roots(imports(path)) & IO


@pytest.mark.parametrize(
    "arguments",
    [
        ["launcher", "--help"],
        ["launcher", "submit", "--help"],
        ["launcher", "plan", "--help"],
        ["launcher", "build", "--help"],
        ["launcher", "report", "--help"],
        ["launcher", "runs", "--help"],
        ["launcher", "watch", "--help"],
        ["trainer", "--help"],
        ["trainer", "run", "--help"],
        ["trainer", "export", "--help"],
    ],
    ids=" ".join,
)
def test_help_loads_neither_torch_nor_sky_nor_matplotlib(arguments: list[str]) -> None:
    """A command's help is answered before anything heavy is imported."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('LOADED', *sorted(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = result.stdout.rpartition("LOADED")[2].split()
    assert "click" in loaded
    assert not set(loaded) & {*HEAVY, "sky", "matplotlib", "obstore"}


@pytest.mark.parametrize("path", TRAINER + LAUNCHER, ids=dotted)
def test_files_stay_small(path: Path) -> None:
    """A file that outgrows its reader is split."""
    assert len(path.read_text().splitlines()) <= 400

"""The private names of other packages that the worker uses are listed, and are as listed in the installed packages."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tests.training.private_names import SURFACE
from tests.training.private_surface import Name, differences

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"trl", "transformers", "accelerate", "deepspeed", "torch", "peft", "bitsandbytes"}
OWN = {"_replace", "_asdict", "_fields", "_exit"}  # documented, of namedtuple and os
WORKER = sorted((ROOT / "trainer" / "worker").rglob("*.py"))
OTHERS = [path for path in (ROOT / "trainer").rglob("*.py") if path not in WORKER]
ROOTS_VARIABLE = "AEOLUS_SURFACE_ROOTS"
"""Folders to compare with instead of the installed packages: `trl=/tmp/unpacked/trl`, separated by commas."""


def roots() -> dict[str, Path]:
    pairs = filter(None, os.environ.get(ROOTS_VARIABLE, "").split(","))
    return {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in pairs)}


def imported(tree: ast.Module) -> set[str]:
    """Return the packages that a file imports from by name."""
    froms = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return {str(node.module).split(".")[0] for node in froms}


def key(path: Path) -> str:
    return str(path.relative_to(ROOT))


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield private names that a file imports from the packages, or reads from an object other than `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
            yield from (part for part in (node.module or "").split(".") if part.startswith("_"))
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and not _is_self(node.value):
            yield node.attr


def overrides(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Yield the methods in `names` that a mixin or a subclass of a package's class overrides."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = (
                each.name
                for each in node.body
                if isinstance(each, ast.FunctionDef) and not each.name.startswith("__")
            )
            yield from (name for name in methods if name in names and _is_override(node, name))


def patches(tree: ast.Module) -> bool:
    """Return whether a file calls `setattr` or uses `vars(...)`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(getattr(call.func, "id", "") in ("setattr", "vars") for call in calls)


def _is_override(node: ast.ClassDef, name: str) -> bool:
    """Return whether a class calls the method of `super()`, or derives from a trainer or callback."""
    derived = any(getattr(base, "id", "").endswith(("Trainer", "Callback")) for base in node.bases)
    calls = (
        isinstance(each, ast.Attribute)
        and each.attr == name
        and isinstance(each.value, ast.Call)
        and getattr(each.value.func, "id", "") == "super"
        for each in ast.walk(node)
    )
    return derived or any(calls)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OWN


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def own_names() -> set[str]:
    """Return the names that our own classes and modules define."""
    found: set[str] = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def test_the_packages_define_every_name_as_listed() -> None:
    """After an upgrade this fails once for all differences, each with owner, name, expected and found."""
    found = differences(chain.from_iterable(SURFACE.values()), roots())
    assert not found, "\n".join(map(str, found))


def test_a_difference_is_reported_with_owner_name_expected_and_found(tmp_path: Path) -> None:
    """A function with another signature, a missing function, a missing attribute and a missing text."""
    package = tmp_path / "trl"
    package.mkdir()
    (package / "__init__.py").write_text("def old(a): ...\nclass Trainer:\n    def f(self): self.x = 1\n")
    names = [
        Name("trl", "old", "(a, b=1)"),
        Name("trl", "gone", "()"),
        Name("trl.Trainer", "x", "attribute"),
        Name("trl.Trainer", "y", "attribute"),
        Name("trl", "some words", "text"),
    ]
    assert [str(each) for each in differences(iter(names), {"trl": package})] == [
        "trl.old: expected (a, b=1), found (a)",
        "trl.gone: expected (), found nothing",
        "trl.Trainer.y: expected attribute, found nothing",
        "trl.some words: expected text, found nothing",
    ]


def test_a_file_uses_only_the_private_names_that_are_listed_for_it() -> None:
    """A new private name, or a new override, needs an entry in the table, which names the file."""
    functions = {each.name for each in chain.from_iterable(SURFACE.values()) if each.expected.startswith("(")}
    ours = own_names() - functions
    unlisted = {}
    for path in WORKER:
        tree = ast.parse(path.read_text())
        entries = SURFACE.get(key(path), ())
        listed = {part for entry in entries for part in (*entry.owner.split("."), entry.name)}
        unlisted[key(path)] = (set(private_names(tree)) - ours | set(overrides(tree, functions))) - listed
    assert {file: names for file, names in unlisted.items() if names} == {}


def test_only_one_file_replaces_names_of_a_module() -> None:
    """`dpo.py` replaces names of TRL's module while the trainer is built; they are listed for it."""
    assert {key(path) for path in WORKER if patches(ast.parse(path.read_text()))} == {"trainer/worker/dpo.py"}


def test_only_the_worker_imports_the_packages() -> None:
    """The generator of the recipe's fields is a development tool."""
    found = {key(path) for path in OTHERS if imported(ast.parse(path.read_text())) & PACKAGES}
    assert found <= {"trainer/recipe/generate_fields.py"}


def test_every_listed_file_exists() -> None:
    assert [file for file in SURFACE if not (ROOT / file).is_file()] == []

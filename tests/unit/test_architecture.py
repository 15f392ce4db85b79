"""The rules of the layout, as tests: who may import whom, and what a laptop command may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "bitsandbytes"}
NODE_ONLY = {"job", "parent_death", "staged", "supervisor", "worker"}
"""Parts of `trainer` that only the node uses. The launcher may import the others."""
DECIDES = (
    "trainer.fit.",
    "trainer.memory.",
    "trainer.estimate.",
    "launcher.plan.rank",
    "launcher.plan.spot",
    "launcher.submit.task",
)
"""Modules that decide and therefore do no I/O."""
IO = {"os", "io", "subprocess", "socket", "pathlib", "obstore", "psutil", "requests"}
MAX_LINES = 400
NEVER = {
    "trainer": {"launcher"},
    "launcher": {f"trainer.{part}" for part in NODE_ONLY},
    "trainer.bucket": {
        f"trainer.{name}" for name in ("job", "fit", "estimate", "memory", "architecture", "recipe")
    },
    "trainer.worker": {"trainer.bucket", "trainer.supervisor"},
    "trainer.supervisor": {"trainer.worker"},
    "trainer.hardware": {"trainer.memory", "trainer.estimate", "trainer.fit"},
    "trainer.memory": {"trainer.estimate", "trainer.fit"},
    "trainer.estimate": {"trainer.fit"},
    "launcher.registry": {"launcher.submit", "launcher.watch"},
    "launcher.runs": {"launcher.submit", "launcher.local", "launcher.watch", "launcher.report"},
    "launcher.cloud": {"launcher.prices", "launcher.plan"},
    "launcher.prices": {"launcher.plan"},
}
"""Package: packages and modules that no file in it imports, not even inside a function."""
MESSAGE_READERS = (
    "trainer.worker.failures",
    "trainer.disk_full",
    "trainer.bucket.store_errors",
    "launcher.cloud.skypilot_errors",
    "launcher.image.",
)
"""The modules that classify an error by its message."""


def dotted(path: Path) -> str:
    """Return the dotted name of a module or package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    dotted(path): path
    for package in ("launcher", "trainer")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def is_below(name: str, package: str) -> bool:
    """Return whether a dotted name is the package or something inside it."""
    return name == package or name.startswith(f"{package}.")


LAUNCHER = [name for name in MODULES if is_below(name, "launcher")]
TRAINER = [name for name in MODULES if is_below(name, "trainer")]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str, *, top_level: bool = False) -> frozenset[str]:
    """Return the dotted names that a module imports, anywhere in it or only at its top level."""
    nodes = tree(module).body if top_level else ast.walk(tree(module))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def roots(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def imported_modules(module: str) -> set[str]:
    """Return our own modules that a module imports."""
    named = {name if name in MODULES else name.rpartition(".")[0] for name in imports(module)}
    return {name for name in named if name in MODULES and name != module}


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def offenders(modules: Iterable[str], breaks: Callable[[str], object]) -> list[str]:
    """Return the modules that break a rule, for the message of a failed assertion."""
    return [module for module in modules if breaks(module)]


def test_no_file_imports_itself_through_others() -> None:
    """The file graph has no cycle; imports inside functions count."""
    assert cycles({module: imported_modules(module) for module in MODULES}) == []


def test_no_package_imports_itself_through_others() -> None:
    """The graph of `launcher.X` and `trainer.X` has no cycle; imports inside functions count."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        package = ".".join(module.split(".")[:2])
        graph[package] |= {".".join(name.split(".")[:2]) for name in imported_modules(module)} - {package}
    assert cycles(graph) == []


def test_a_cycle_is_found() -> None:
    """The search for cycles reports each group once."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}}
    assert sorted(cycles(graph)) == [["b", "c"], ["d", "e"]]


@pytest.mark.parametrize("package", NEVER)
def test_a_package_does_not_import_what_is_above_it(package: str) -> None:
    """Dependencies point one way, so that a package can be read and tested without those above it."""
    inside = [module for module in MODULES if is_below(module, package)]
    wrong = {
        (module, name)
        for module in inside
        for name in imports(module)
        for no in NEVER[package]
        if is_below(name, no)
    }
    assert wrong == set()


def test_the_recipe_imports_only_errors_and_methods() -> None:
    """A recipe is read without hardware, memory or bucket."""
    allowed = ("trainer.recipe", "trainer.errors", "trainer.method")
    wrong = {
        (module, name)
        for module in MODULES
        if is_below(module, "trainer.recipe")
        for name in imports(module)
        if is_below(name, "trainer") and not any(is_below(name, each) for each in allowed)
    }
    assert wrong == set()


def test_the_trainer_does_not_import_skypilot() -> None:
    """The container has no SkyPilot."""
    assert offenders(TRAINER, lambda module: "sky" in roots(imports(module))) == []


def test_only_the_worker_imports_torch() -> None:
    """The supervisor survives a crash of torch, and the laptop has none."""
    rest = [m for m in MODULES if not is_below(m, "trainer.worker") and m != "trainer.recipe.generate_fields"]
    assert offenders(rest, lambda module: roots(imports(module)) & HEAVY) == []


def test_the_worker_does_not_use_the_object_store() -> None:
    """Training could be any program under the same supervisor."""
    worker = [module for module in TRAINER if is_below(module, "trainer.worker")]
    assert offenders(worker, lambda module: "obstore" in roots(imports(module))) == []


def test_one_file_imports_skypilot_and_only_inside_functions() -> None:
    """`import sky` takes seconds, and what SkyPilot changes stays in one adapter."""
    assert offenders(LAUNCHER, lambda module: "sky" in roots(imports(module, top_level=True))) == []
    assert offenders(LAUNCHER, lambda module: "sky" in roots(imports(module))) == ["launcher.cloud.skypilot"]


def test_modules_that_decide_do_no_io() -> None:
    """A decision is a function of its arguments, so the laptop and the node decide alike."""
    decides = [module for module in MODULES if module.startswith(DECIDES)]
    assert offenders(decides, lambda module: roots(imports(module)) & IO) == []


def test_no_class_name_is_defined_twice() -> None:
    """A class name means one thing in the whole project."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_errors_are_classified_by_message_only_where_listed() -> None:
    """A message that another package changes breaks one of few modules, which have tests for it."""
    rest = [module for module in MODULES if not module.startswith(MESSAGE_READERS)]
    assert offenders(rest, lambda module: list(message_reads(tree(module)))) == []


def message_reads(module: ast.AST) -> Iterable[ast.AST]:
    """Yield the places that search in the text of an error: `"..." in str(error)`, `re.search(..., str(error))`."""
    errors = {each.name for each in ast.walk(module) if isinstance(each, ast.ExceptHandler)} | {"error"}
    for node in ast.walk(module):
        searched: list[ast.expr] = []
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            searched = node.comparators
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
            searched = node.args
        if any(is_text_of(part, errors) for each in searched for part in ast.walk(each)):
            yield node


def is_text_of(node: ast.AST, errors: Container[str | None]) -> bool:
    """Return whether the node is `str(error)` or `repr(error)`."""
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("str", "repr")
    ):
        return False
    return any(isinstance(each, ast.Name) and each.id in errors for each in ast.walk(node))


def test_a_search_in_a_message_is_found() -> None:
    """The search for message readers sees a comparison and a regular expression, and passes other uses over."""
    source = """
try: f()
except OSError as error:
    if "full" in str(error): g()
    if re.search("full", repr(error)): g()
    log.warning("%s", str(error))
"""
    assert len(list(message_reads(ast.parse(source)))) == 2


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


def test_files_stay_small() -> None:
    """A file that outgrows its reader is split."""
    assert offenders(MODULES, lambda module: len(MODULES[module].read_text().splitlines()) > MAX_LINES) == []

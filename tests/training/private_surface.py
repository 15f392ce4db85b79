"""Compare the private and undocumented names of other packages that our code uses with the installed packages.

The sources of the packages are parsed, not imported, so this takes seconds and needs no GPU.
The table is in `private_names.py`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ATTRIBUTE, CLASS, DEFINED, TEXT = "attribute", "class", "name", "text"
MISSING = "nothing"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Name(NamedTuple):
    """A name of another package that our code overrides, patches or reads."""

    owner: str
    """Dotted path of the module or class that defines it. A class must define it itself, not inherit it."""
    name: str
    expected: str
    """A function's signature without annotations, or one of these words:

    `attribute`: the class sets `self.<name>`, or sets the name in its body.
    `class`: the module defines a class.
    `name`: the module defines or imports the name.
    `text`: the module's source contains the text.
    """
    body: str = ""
    """Digest of the function's code, for functions that we override or whose steps we repeat. Optional."""


class Difference(NamedTuple):
    """A name that is not as expected in the installed package."""

    owner: str
    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}: expected {self.expected}, found {self.found}"


def differences(names: Iterator[Name], roots: Mapping[str, Path] | None = None) -> list[Difference]:
    """Return every name of the table that the installed packages define differently or not at all.

    Args:
        names: the table.
        roots: folders to use instead of an installed package, by the package's name.
    """
    found = []
    for expected in names:
        actual = look_up(expected, dict(roots or {}))
        wanted = expected.expected
        if actual.expected == wanted and expected.body and actual.body != expected.body:
            found.append(
                Difference(expected.owner, expected.name, f"code {expected.body}", f"code {actual.body}")
            )
        elif actual.expected != wanted:
            found.append(Difference(expected.owner, expected.name, wanted, actual.expected))
    return found


def look_up(name: Name, roots: Mapping[str, Path]) -> Name:
    """Return the name as the package defines it, with `expected` set to `MISSING` if it does not."""
    path, inside = _source_of(name.owner, roots)
    missing = name._replace(expected=MISSING, body="")
    if path is None:
        return missing._replace(expected=f"no module of {name.owner}")
    if name.expected == TEXT:
        return name if name.name in path.read_text() else missing
    body: list[ast.stmt] = _parse(path).body
    for part in inside:
        parent = _class(body, part)
        if parent is None:
            return missing._replace(expected=f"no class {part} in {path.name}")
        body = parent.body
    if function := _function(body, name.name):
        return name._replace(expected=_signature(function), body=_digest(path, function))
    return name._replace(expected=_kind(body, name, in_class=bool(inside)), body="")


def _kind(body: list[ast.stmt], name: Name, *, in_class: bool) -> str:
    """Return what a body defines under a name that is not a function."""
    if _class(body, name.name):
        return CLASS if name.expected == CLASS else DEFINED
    if in_class and name.name in _attributes(body):
        return ATTRIBUTE
    return DEFINED if name.name in _bound(body) else MISSING


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _source_of(owner: str, roots: Mapping[str, Path]) -> tuple[Path | None, list[str]]:
    """Return the file of the longest module in a dotted path, and the classes that follow."""
    package, *rest = owner.split(".")
    root = roots.get(package) or _installed(package)
    if root is None:
        return None, []
    path = root
    for number, part in enumerate(rest):
        if (path / part).is_dir():
            path = path / part
            continue
        for suffix in (".py", ".pyi"):
            if (file := path / f"{part}{suffix}").is_file():
                return file, rest[number + 1 :]
        return next(path.glob("__init__.py*")), rest[number:]
    return next(path.glob("__init__.py*")), []


@cache
def _installed(package: str) -> Path | None:
    found = importlib.util.find_spec(package)  # a top-level package is not imported by this
    return Path(found.origin).parent if found and found.origin else None


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, including those under `if`, `try` and `with`."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _class(body: list[ast.stmt], name: str) -> ast.ClassDef | None:
    found = (each for each in _statements(body) if isinstance(each, ast.ClassDef) and each.name == name)
    return next(found, None)


def _function(body: list[ast.stmt], name: str) -> Function | None:
    found = (each for each in _statements(body) if isinstance(each, Function) and each.name == name)
    return next(found, None)


def _signature(function: Function) -> str:
    """Return a signature with defaults and without annotations, as `inspect.signature` writes it."""
    arguments = ast.parse(ast.unparse(function.args).join(("def f(", "): pass")))
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"({ast.unparse(arguments.body[0].args)})"  # type: ignore[attr-defined]


def _digest(path: Path, function: Function) -> str:
    """Return a digest of a function's code without its docstring, full-line comments and indentation."""
    lines = path.read_text().splitlines()
    first = function.body[0]
    skip = range(first.lineno, (first.end_lineno or 0) + 1) if ast.get_docstring(function) else range(0)
    code = [
        lines[number - 1].strip()
        for number in range(function.lineno, (function.end_lineno or 0) + 1)
        if number not in skip
    ]
    kept = "\n".join(line for line in code if line and not line.startswith("#"))
    return hashlib.sha256(kept.encode()).hexdigest()[:12]


def _attributes(body: list[ast.stmt]) -> set[str]:
    """Return the names that a class sets in its body or on `self` in its methods."""
    names = _bound(body)
    for method in (node for node in _statements(body) if isinstance(node, Function)):
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                names.add(node.attr)
    return names


def _bound(body: list[ast.stmt]) -> set[str]:
    """Return the names that assignments, imports and loops bind in a body."""
    names: set[str] = set()
    for statement in _statements(body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        elif isinstance(statement, ast.ClassDef | Function):
            names.add(statement.name)
    return names

"""The laboratory is brought up once, by the first test that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.lab.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A real SkyPilot on this machine; skips with the reason where it cannot be had."""
    pytest.importorskip("sky", reason="SkyPilot is not installed: make setup")
    from tests.e2e.lab.lab import lab as brought_up
    from tests.e2e.lab.namespace import NotToBeHad

    with ExitStack() as stack:
        try:
            made = stack.enter_context(brought_up())
        except NotToBeHad as error:
            pytest.skip(str(error))
        yield made


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks at the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the laboratory may wait for SkyPilot longer than other tests may run, and all of it has one worker;
    whatever else is here has another, as much of that time nothing is computed.
    """
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        needs_lab = "lab" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("lab" if needs_lab else "others"))
        if needs_lab:
            item.add_marker(pytest.mark.timeout(3600))
    items.sort(key=lambda item: "lab" in getattr(item, "fixturenames", ()))

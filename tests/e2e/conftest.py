"""The laboratory is brought up once, by the first test that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.lab.lab import Lab

WITH_LAB = ("test_doctor.py", "test_plans.py", "test_tasks.py", "test_slurm.py")
IN_ORDER = ("test_image.py", *WITH_LAB)
"""The others follow. The longest come first; of the laboratory's, SkyPilot is told seldom what clouds it has."""


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the laboratory may wait for SkyPilot longer than other tests may run."""
    here = {item for item in items if Path(__file__).parent in item.path.parents}
    for item in here:
        if "lab" in getattr(item, "fixturenames", ()):
            if item.path.name not in WITH_LAB:
                raise pytest.UsageError(f"{item.path.name} needs the laboratory: name it in WITH_LAB")
            item.add_marker(pytest.mark.timeout(3600))
    order = {name: number for number, name in enumerate(IN_ORDER)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)) if item in here else -1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each slow fixture a process of its own: SkyPilot, the image, and the demo with the pages."""
    from xdist.scheduler import LoadScopeScheduling

    class ByNeed(LoadScopeScheduling):  # type: ignore[misc,unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.endswith(WITH_LAB):
                return "lab"
            if file.endswith("test_image.py"):
                return "image"
            return "others" if "e2e" in file else file

    return ByNeed(config, log)

"""A stand-in for SkyPilot's catalogs, for tests and for trying a plan without SkyPilot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.cloud.skypilot import Fetched
from trainer.errors import Unavailable, UserError


class FakeCatalogs:
    """Answers what it was given; of every other cloud, that the network is down. Remembers what it was asked."""

    def __init__(self, answers: Mapping[str, Fetched | UserError] | None = None) -> None:
        self.answers = dict(answers or {})
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, infras: Sequence[str]) -> Mapping[str, Fetched | UserError]:
        self.asked.append(tuple(infras))
        return {infra: self.answers.get(infra, Unavailable("the network is down")) for infra in infras}

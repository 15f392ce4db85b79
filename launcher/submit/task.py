"""A submission as the task that SkyPilot is given: a value, so that a dry run and a test see all of it; no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from launcher.plan.rank import Plan, PlanRow
from trainer.errors import RecipeError, UserError

VARIABLES = ("RECIPE", "CHECKPOINTS", "OVERRIDES", "RUN")
"""What every task of `jobs/` takes."""
NODE_PYTHON = "AEOLUS_TRAINER_PYTHON"
PLACE = ("infra", "accelerators", "use_spot", "instance_type")
CHOICE = (*PLACE, "ordered", "any_of")
"""Keys of a task's `resources` that say where; the others hold wherever it is."""
ORDER = ("name", "envs", "secrets", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run")
"""Of a task's keys, for who reads it."""
FALLBACKS = 5
"""Where else SkyPilot may look if what was chosen cannot be had."""
DEARER = 2.0
"""Own choice: nothing is rented without asking for more than so many times the expected dollars of what was chosen."""
IDLE_MIN = 10
"""Minutes without a job after which a cluster of ours goes down, so that nobody pays for a forgotten one."""

Config = dict[str, Any]


class Candidate(BaseModel):
    """Where a task may run: one entry of SkyPilot's `ordered`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    infra: str
    """A cloud, in whose regions SkyPilot looks for itself, the cheapest first; or `gcp/us-central1`, that region alone."""
    accelerators: str
    """Of one node: `A100:8`."""
    use_spot: bool | None
    """None where nobody asks: SkyPilot's Slurm knows no spot."""
    instance_type: str | None = None
    """Hosts of one GPU differ in memory, which the plan has counted."""


class TaskSpec(BaseModel):
    """What is asked of SkyPilot, but for the values of secrets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    recipe: str
    """As the node finds it: a shipped name, or a path there."""
    checkpoints: str
    overrides: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    nodes: int = 1
    image: str | None = None
    secrets: tuple[str, ...] = ()
    """Names of variables; their values are handed over at the launch and are in no file."""
    workdir: str | None = None
    envs: Mapping[str, str] = {}
    """Variables of the nodes beside the task's own; nothing secret."""
    mounts: Mapping[str, str] = {}
    """Path on the node: path here."""
    node_python: str | None = None
    autostop: bool = False
    """Whether the cluster goes down `IDLE_MIN` after its last job; managed jobs see to that themselves."""

    @property
    def where(self) -> str:
        """The first candidate in words: `2 x A100:8 spot on gcp`."""
        first = self.candidates[0]
        market = {True: " spot", False: " on demand", None: ""}[first.use_spot]
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{first.accelerators}{market} on {first.infra}"


def task_config(base: Mapping[str, Any], request: TaskSpec) -> Config:
    """The task of `jobs/` with what was asked for: `setup` and `run` stay as they are.

    Raises:
        UserError: a task that does not take what ours take, or an override that cannot be handed on.
    """
    config: Config = {key: value for key, value in base.items() if key not in ("secrets", "file_mounts")}
    config["name"] = cloud_name(request.run_id)
    config["envs"] = _envs(base, request)
    config["secrets"] = dict.fromkeys(request.secrets)
    config["resources"] = _resources(base.get("resources") or {}, request)
    config.pop("workdir", None)
    if request.workdir:
        config["workdir"] = request.workdir
    if request.nodes > 1 or "num_nodes" in base:
        config["num_nodes"] = request.nodes
    if mounts := {**(base.get("file_mounts") or {}), **request.mounts}:
        config["file_mounts"] = mounts
    return {key: config[key] for key in sorted(config, key=_place) if config[key] not in ({}, None)}


def _place(key: str) -> int:
    return ORDER.index(key) if key in ORDER else len(ORDER)


def candidates(
    planned: Plan, *, managed: bool, asked: Sequence[str], named: bool = False
) -> tuple[Candidate, ...]:
    """The plan's rows in its order, the chosen one first; spot only where a lost machine is recovered.

    Args:
        planned: has a chosen row.
        managed: whether SkyPilot recovers the job.
        asked: the user's `--infra`; a region in it is kept.
        named: the user named the GPUs, or a budget: then all of the plan's rows are theirs.
    """
    chosen = planned.rows[0]
    rows = [row for row in planned.rows if managed or not row.spot]
    near = [row for row in rows if named or row.usd <= DEARER * chosen.usd]
    return tuple(dict.fromkeys(_candidate(row, asked) for row in near))[: 1 + FALLBACKS]


def cloud_name(run_id: str) -> str:
    """What SkyPilot calls the run's cluster or managed job: letters, digits, `-_.`, a letter first, no dot last.

    https://docs.skypilot.co/en/v0.14.1/reference/yaml-spec.html; the pattern is `CLUSTER_NAME_VALID_REGEX` in
    SkyPilot's `sky/skylet/constants.py`.
    """
    name = re.sub(r"[^A-Za-z0-9]+$", "", run_id)
    return name if name[:1].isalpha() else f"run-{name}"


def to_yaml(config: Mapping[str, Any]) -> str:
    """The task as a file that `sky launch` takes; scripts stay readable, and secrets have names only."""
    return yaml.dump(dict(config), Dumper=_Readable, sort_keys=False, width=120, allow_unicode=True)


def _envs(base: Mapping[str, Any], request: TaskSpec) -> dict[str, str]:
    given = {str(name): str(value or "") for name, value in (base.get("envs") or {}).items()}
    if missing := [name for name in VARIABLES if name not in given]:
        hint = "see `envs` of jobs/dpo_full.yaml"
        raise UserError(f"the task {base.get('name')} takes no {', '.join(missing)}", hint=hint)
    python = {NODE_PYTHON: request.node_python} if request.node_python else {}
    return {
        **given,
        "RECIPE": request.recipe,
        "CHECKPOINTS": request.checkpoints,
        "OVERRIDES": " ".join(_handed_on(request.overrides)),
        "RUN": request.run_id,
        **python,
        **request.envs,
    }


def _handed_on(overrides: Sequence[str]) -> Iterator[str]:
    """Overrides go through a variable that the node's shell takes apart at blanks."""
    for word in overrides:
        if re.search(r"[\s*?'\"\\]", word):
            key = word.partition("=")[0]
            raise RecipeError(
                f"command line: `{key}` has blanks, quotes or wildcards, which the way to the node would change",
                hint="put it into a recipe file, and submit that",
            )
        yield word


def _resources(base: Mapping[str, Any], request: TaskSpec) -> Config:
    common = {key: value for key, value in base.items() if key not in CHOICE}
    if request.image:
        common["image_id"] = f"docker:{request.image.removeprefix('docker:')}"
    if request.autostop:
        common["autostop"] = {"idle_minutes": IDLE_MIN, "down": True}
    entries = [_entry(candidate, base) for candidate in request.candidates]
    return {**common, **entries[0]} if len(entries) == 1 else {**common, "ordered": entries}


def _entry(candidate: Candidate, base: Mapping[str, Any]) -> Config:
    """A place, with what the task has to say of its cloud, such as Google's kinds of disks and networks."""
    entry = {key: value for key, value in candidate.model_dump().items() if value is not None}
    cloud = candidate.infra.partition("/")[0]
    listed = base.get("ordered") or base.get("any_of") or ()
    same: Mapping[str, Any] = next(
        (each for each in listed if str(each.get("infra")).partition("/")[0] == cloud), {}
    )
    return {**entry, **{key: value for key, value in same.items() if key not in PLACE}}


def _candidate(row: PlanRow, asked: Sequence[str]) -> Candidate:
    regions = {name.lower() for name in asked if "/" in name}
    pinned = f"{row.offer.infra}/{row.offer.region}"
    return Candidate(
        infra=pinned if any(name.startswith(f"{row.offer.infra}/") for name in regions) else row.offer.infra,
        accelerators=f"{row.shape.accelerator}:{row.shape.count}",
        use_spot=row.spot,
        instance_type=row.offer.instance_type,
    )


class _Readable(yaml.SafeDumper):
    """Writes several lines as a block, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)

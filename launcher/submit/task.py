"""Build SkyPilot's task from a submission, without I/O, so that a dry run and a test see the whole task."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from launcher.plan.rank import Plan, PlanRow
from trainer.errors import RecipeError, UserError

VARIABLES = ("RECIPE", "CHECKPOINTS", "OVERRIDES", "RUN")
"""Environment variables that every task of `jobs/` takes."""
NODE_PYTHON = "AEOLUS_TRAINER_PYTHON"
PLACE = ("infra", "accelerators", "use_spot", "instance_type")
CHOICE = (*PLACE, "ordered", "any_of")
"""Keys of a task's `resources` that choose the place; the others apply to any place."""
ORDER = ("name", "envs", "secrets", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run")
"""Order of a task's keys, for readers."""
FALLBACKS = 5
"""Number of other places that SkyPilot may try if the chosen one is unavailable."""
DEARER = 2.0
"""Largest cost of a fallback that the user has not asked for, as a multiple of the chosen place's expected cost."""
IDLE_MIN = 10
"""Minutes without a job after which a cluster goes down, so that a forgotten one does not cost money."""

Config = dict[str, Any]


class Candidate(BaseModel):
    """A place where a task may run: one entry of SkyPilot's `ordered`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    infra: str
    """A cloud, whose regions SkyPilot tries from the cheapest on; or one region only, such as `gcp/us-central1`."""
    accelerators: str
    """GPUs of one node, such as `A100:8`."""
    use_spot: bool | None
    """None for infrastructure without spot: SkyPilot's Slurm does not take the key."""
    instance_type: str | None = None
    """The host that the plan has chosen; hosts for the same GPU differ in memory."""


class TaskSpec(BaseModel):
    """The inputs of a task, without the values of secrets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    recipe: str
    """The recipe on the node: a shipped name, or a path there."""
    checkpoints: str
    overrides: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    nodes: int = 1
    image: str | None = None
    secrets: tuple[str, ...] = ()
    """Names of variables. Their values are passed at the launch and are in no file."""
    workdir: str | None = None
    envs: Mapping[str, str] = {}
    """Variables of the nodes in addition to the task's own; none of them is secret."""
    mounts: Mapping[str, str] = {}
    """Path on the node: path here."""
    node_python: str | None = None
    autostop: bool = False
    """Whether the cluster goes down `IDLE_MIN` after its last job; a managed job's machine always does."""

    @property
    def where(self) -> str:
        """The first candidate in words: `2 x A100:8 spot on gcp`."""
        first = self.candidates[0]
        market = {True: " spot", False: " on demand", None: ""}[first.use_spot]
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{first.accelerators}{market} on {first.infra}"


def task_config(base: Mapping[str, Any], request: TaskSpec) -> Config:
    """Return the task of `jobs/` with the inputs filled in; `setup` and `run` stay as they are.

    Raises:
        UserError: the task does not take our variables, or an override cannot be passed to the node unchanged.
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
    """Return the places of the plan's rows, the chosen one first. Spot is included only for a managed job.

    Args:
        planned: a plan with a chosen row.
        managed: whether SkyPilot recovers the job.
        asked: the user's `--infra`; a region in it stays in the place.
        named: whether the user named the GPUs or a budget. Then dear rows are not left out.
    """
    chosen = planned.rows[0]
    rows = [row for row in planned.rows if managed or not row.spot]
    near = [row for row in rows if named or row.usd <= DEARER * chosen.usd]
    return tuple(dict.fromkeys(_candidate(row, asked) for row in near))[: 1 + FALLBACKS]


def cloud_name(run_id: str) -> str:
    """Return SkyPilot's name for the run's cluster or managed job: letters, digits, `-_.`, a letter first, no dot last.

    https://docs.skypilot.co/en/v0.14.1/reference/yaml-spec.html; the pattern is `CLUSTER_NAME_VALID_REGEX` in
    SkyPilot's `sky/skylet/constants.py`.
    """
    name = re.sub(r"[^A-Za-z0-9]+$", "", run_id)
    return name if name[:1].isalpha() else f"run-{name}"


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return the task as a file for `sky launch`. Scripts stay readable; of secrets there are only the names."""
    return yaml.dump(dict(config), Dumper=_Readable, sort_keys=False, width=120, allow_unicode=True)


def _envs(base: Mapping[str, Any], request: TaskSpec) -> dict[str, str]:
    given = {str(name): str(value or "") for name, value in (base.get("envs") or {}).items()}
    if missing := [name for name in VARIABLES if name not in given]:
        hint = "see `envs` of jobs/dpo_full.yaml"
        raise UserError(f"the task {base.get('name')} has no variable {', '.join(missing)}", hint=hint)
    python = {NODE_PYTHON: request.node_python} if request.node_python else {}
    return {
        **given,
        "RECIPE": request.recipe,
        "CHECKPOINTS": request.checkpoints,
        "OVERRIDES": " ".join(_checked_overrides(request.overrides)),
        "RUN": request.run_id,
        **python,
        **request.envs,
    }


def _checked_overrides(overrides: Sequence[str]) -> Iterator[str]:
    """Yield the overrides. They reach the node in a variable that its shell splits at blanks."""
    for word in overrides:
        if re.search(r"[\s*?'\"\\]", word):
            key = word.partition("=")[0]
            raise RecipeError(
                f"command line: `{key}` has blanks, quotes or wildcards, which the node's shell would change",
                hint="put it into a recipe file, and submit the file",
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
    """Return a place with the task's own keys for its cloud, such as the kinds of disks and networks on Google Cloud."""
    entry = {key: value for key, value in candidate.model_dump().items() if value is not None}
    cloud = candidate.infra.partition("/")[0]
    listed = base.get("ordered") or base.get("any_of") or ()
    same: Mapping[str, Any] = next(
        (entry for entry in listed if str(entry.get("infra")).partition("/")[0] == cloud), {}
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
    """Writes text of several lines as a block, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)

"""A submission, decided: the plan's choice, and the task for SkyPilot. What a dry run prints is what is launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import settings
from launcher.cloud import skypilot
from launcher.image.builders import BuildOptions
from launcher.plan.plan import LoadPrices, make_plan, no_fit_error
from launcher.plan.rank import PlanRequest, PlanRow, parse_gpus
from launcher.prices.load import load_prices
from launcher.runs.limits import limits_for
from launcher.settings import Settings
from launcher.submit import cost_variables, job_files, node_inputs, task
from launcher.submit.image import container, login
from launcher.submit.job_files import JobFile
from launcher.submit.task import Candidate, Config, TaskSpec
from trainer.accounting import Limits
from trainer.architecture.lookup import find_architecture, with_login
from trainer.bucket.address import canonical
from trainer.bucket.layout import checked_run_id
from trainer.errors import UserError
from trainer.fit import fit
from trainer.hardware import Shape, gpu
from trainer.recipe import Recipe, default_run_id, load

REMEMBERED = ("gpus", "nodes", "spot", "managed", "infra", "image", "retry_until_up", "rows")
SHARED = ("slurm", "ssh")
"""Machines of one's own that often have a file system in common with where one submits."""
NO_HOST_LIMIT_GIB = 1e6
"""Of a machine of one's own nobody knows the memory here; the trainer measures it there."""


@dataclass(frozen=True)
class SubmitOptions:
    """The options of `submit`, as typed."""

    source: str | None = None
    overrides: tuple[str, ...] = ()
    gpus: str | None = None
    nodes: int | None = None
    spot: bool | None = None
    managed: bool = False
    infra: tuple[str, ...] = ()
    name: str | None = None
    image: str | None = None
    checkpoints: str | None = None
    retry_until_up: bool = False
    budget_usd: float | None = None
    deadline_h: float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Order:
    """What is going to be launched."""

    recipe: str
    request: TaskSpec
    config: Config
    managed: bool
    retry_until_up: bool
    row: PlanRow | None
    """The plan's; None where machines are not rented."""
    said: tuple[str, ...]
    """Why it is this, a line each."""
    secrets: Mapping[str, str] = field(repr=False)
    """Values: for the launch alone."""
    build: BuildOptions | None = None
    """The image has to be made before a machine can start from it."""
    limits: Limits = field(default_factory=Limits)
    """Of the whole run, all attempts together."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Where it was asked for, so that `--resume` asks for the same."""

    @property
    def name(self) -> str:
        """SkyPilot's."""
        return str(self.config["name"])

    @property
    def where(self) -> str:
        first = self.request.candidates[0]
        kind = {True: " spot", False: " on demand", None: ""}[first.use_spot]
        nodes = f"{self.request.nodes} x " if self.request.nodes > 1 else ""
        return f"{nodes}{first.accelerators}{kind} on {first.infra}"


@dataclass(frozen=True)
class _Place:
    """Where it may run, and why there."""

    candidates: tuple[Candidate, ...]
    managed: bool
    row: PlanRow | None
    said: tuple[str, ...]
    envs: Mapping[str, str] = field(default_factory=dict)
    """What the nodes are told of money."""


def prepare(
    wanted: SubmitOptions,
    *,
    environ: Mapping[str, str],
    now: datetime,
    prices: LoadPrices = load_prices,
    cwd: Path | None = None,
) -> Order:
    """Everything about a submission but its launch; asks for prices, and rents nothing.

    Raises:
        NoFit: no machine that can be rented fits; the error has the reasons and a hint.
        UserError: the recipe, the task, the settings, or an option is wrong; the nodes could not reach the bucket.
    """
    site = settings.load(environ)
    job = job_files.find(wanted.source)
    overrides = (*job.overrides, *wanted.overrides)
    loaded = load(job.recipe, overrides)
    infra = wanted.infra or site.infra
    own = _own(infra)
    limits = limits_for(
        site,
        budget_usd=wanted.budget_usd,
        deadline_h=wanted.deadline_h,
        owned=", ".join(infra) if own else None,
    )
    checkpoints = node_inputs.reachable(
        canonical(wanted.checkpoints or site.checkpoints, cwd or Path.cwd()), environ, infra, own=own
    )
    data, files = ((), {}) if _shared(infra) else node_inputs.data_there(loaded.recipe)
    if not _shared(infra):
        node_inputs.refuse_local_model(loaded.recipe)
    nodes = wanted.nodes or int(job.base.get("num_nodes") or 1)
    place = (
        _at_home(loaded.recipe, wanted, site, infra, nodes)
        if own
        else _rented(loaded.recipe, wanted, limits, job, infra=infra, nodes=nodes, now=now, prices=prices)
    )
    save = _save_steps(place, wanted.overrides)
    recipe, mounts = node_inputs.recipe_there(job.recipe)
    secrets = node_inputs.secrets(job.base, checkpoints, with_login(environ))
    made = container(wanted.image, site, own=own)
    secrets |= login(made.image, environ)
    request = TaskSpec(
        run_id=checked_run_id(wanted.name, new=True) if wanted.name else default_run_id(loaded.recipe),
        recipe=recipe,
        checkpoints=checkpoints,
        overrides=(*overrides, *data, *save),
        candidates=place.candidates,
        nodes=nodes,
        image=made.image,
        secrets=tuple(secrets),
        workdir=node_inputs.workdir(made.image),
        mounts={**mounts, **files},
        node_python=str(site.node_python) if own and site.node_python else None,
        autostop=not place.managed and not own,
        envs={**place.envs, **cost_variables.limits(limits)},
    )
    return Order(
        recipe=loaded.recipe.name,
        request=request,
        config=task.task_config(job.base, request),
        managed=place.managed,
        retry_until_up=wanted.retry_until_up,
        row=place.row,
        said=(*loaded.notes, *place.said, *(f"{word}: the plan's interval for spot" for word in save)),
        secrets=secrets,
        build=made.wishes,
        limits=limits,
        options={name: getattr(wanted, name) for name in REMEMBERED},
    )


def _shared(infra: Sequence[str]) -> bool:
    """Whether the nodes may see this machine's files; pods and rented machines never do."""
    return all(name.partition("/")[0].lower() in SHARED for name in infra)


def _own(infra: Sequence[str]) -> bool:
    """Whether the machines are one's own: no prices, no spot."""
    own = {name.partition("/")[0].lower() in (*skypilot.UNPRICED, "k8s") for name in infra}
    if len(own) > 1:
        raise UserError(
            f"machines that are rented and machines that are not: {', '.join(infra)}", hint="name one kind"
        )
    return own == {True}


def _rented(  # noqa: PLR0913 (what a plan depends on)
    recipe: Recipe,
    wanted: SubmitOptions,
    limits: Limits,
    job: JobFile,
    *,
    infra: Sequence[str],
    nodes: int,
    now: datetime,
    prices: LoadPrices,
) -> _Place:
    gpus = wanted.gpus or job.gpus
    accelerator, count = parse_gpus(gpus) if gpus else (None, None)
    wishes = PlanRequest(
        accelerator=accelerator,
        count=count,
        nodes=nodes,
        spot=wanted.spot,
        budget_usd=limits.budget_usd,
        deadline_h=limits.deadline_h,
    )
    asked = prices(now=now, infra=infra, refresh=False)
    found = make_plan(recipe, wishes, infra=infra, now=now, rows=wanted.rows, prices=lambda **_: asked)
    chosen = found.chosen
    if chosen is None:
        raise no_fit_error(found)
    managed = wanted.managed or chosen.spot
    named = bool(gpus or wishes.budget_usd)
    said = [
        f"chosen: {found.why}",
        f"  {chosen.fit.words()}: ${chosen.usd:,.0f} in {chosen.hours:.1f} h expected",
    ]
    said += [f"  {reason}" for reason in chosen.fit.reasons]
    said += [
        f"  data: {found.workload.source}",
        f"  prices: {found.prices}",
        *(f"  {note}" for note in found.notes),
    ]
    if managed and not wanted.managed:
        said.append("as a managed job: spot machines are lost, and SkyPilot finds the next one")
    places = task.candidates(found, managed=managed, asked=infra, named=named)
    told = cost_variables.variables(chosen, places, asked.offers, nodes=nodes)
    return _Place(places, managed, chosen, tuple(said), told)


def _at_home(
    recipe: Recipe, wanted: SubmitOptions, site: Settings, infra: Sequence[str], nodes: int
) -> _Place:
    """Machines that are not rented: nothing to rank, but what cannot fit on such GPUs is refused all the same."""
    if wanted.spot:
        raise UserError(f"{', '.join(infra)} has no spot", hint="`--managed` recovers a lost job there, too")
    accelerator, count = parse_gpus(wanted.gpus) if wanted.gpus else (None, None)
    if accelerator is None or count is None:
        raise UserError(f"which GPUs of {', '.join(infra)}?", hint="`--gpus A100:8`")
    shape = Shape(
        accelerator=accelerator,
        count=count,
        memory_gib=gpu(accelerator).memory_gib,
        cores=count,
        host_memory_gib=NO_HOST_LIMIT_GIB,
        node=infra[0],
        nodes=nodes,
    )
    chosen = fit(recipe, shape, find_architecture(recipe))
    said = (
        f"{shape} on {', '.join(infra)}: {chosen.words()}, if the host's memory allows: it is not known here",
    )
    places = tuple(
        Candidate(infra=name, accelerators=f"{accelerator}:{count}", use_spot=None) for name in infra
    )
    return _Place(places, wanted.managed, None, said, cost_variables.own_price(site.usd_per_h))


def _save_steps(place: _Place, overrides: Sequence[str]) -> tuple[str, ...]:
    """The plan's interval between checkpoints on spot, unless the user names one."""
    steps = place.row.save_steps if place.row else None
    said = any(word.startswith("save_steps=") for word in overrides)
    return (f"save_steps={steps}",) if steps and not said else ()

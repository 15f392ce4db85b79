"""Prepare a submission: resolve its facts once, decide where it runs, build the job to launch.

A dry run prints exactly what is launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from launcher import settings
from launcher.cloud import skypilot
from launcher.cloud.local import WHERE
from launcher.cloud.protocol import Kind, LaunchRequest
from launcher.image.builders import BuildOptions
from launcher.local.process import Home, supervisor_command, supervisor_environment
from launcher.plan.plan import LoadPrices, find_workload, no_fit_error
from launcher.plan.rank import PlanRequest, PlanRow, parse_gpus, plan
from launcher.prices.load import load_prices
from launcher.prices.offer import Prices
from launcher.runs.limits import limits_for
from launcher.settings import Settings
from launcher.submit import job_files, node_inputs, task
from launcher.submit.job_files import JobFile
from launcher.submit.node_inputs import Container
from launcher.submit.task import Candidate, TaskSpec
from trainer.accounting import Limits
from trainer.architecture import Architecture
from trainer.architecture.lookup import find_architecture, with_login
from trainer.bucket.address import canonical
from trainer.bucket.layout import checked_run_id
from trainer.errors import UserError
from trainer.estimate import Workload
from trainer.fit import fit
from trainer.hardware import Shape, gpu
from trainer.recipe import Recipe, default_run_id, load

LOCAL = "local"
"""The `--infra` of this machine."""
REMEMBERED = ("gpus", "nodes", "spot", "managed", "infra", "image", "retry_until_up", "rows")
"""Options that `--resume` repeats."""
SHARED = ("slurm", "ssh")
"""Infrastructure whose nodes often share a file system with the machine that submits."""
NO_HOST_LIMIT_GIB = 1e6
"""The memory of the user's own nodes is unknown here; the trainer measures it there."""
Venue = Literal["local", "own", "rented"]
"""`local`: this machine. `own`: a cluster of the user, without prices and spot. `rented`: a cloud."""


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
class SubmitFacts:
    """Everything that a submission depends on, looked up once."""

    options: SubmitOptions
    site: Settings
    environ: Mapping[str, str] = field(repr=False)
    infra: tuple[str, ...]
    venue: Venue
    job: JobFile
    recipe: Recipe
    notes: tuple[str, ...]
    """Keys of the recipe that are read differently from how they are written, a line each."""
    run_id: str
    checkpoints: str
    """Canonical address of the folder of runs."""
    limits: Limits
    nodes: int
    gpus: tuple[str | None, int | None]
    """The GPUs that a node must have: name and number; None: the plan chooses."""
    image: Container

    data_overrides: tuple[str, ...]
    """Overrides that name local data files by their path on the node."""
    data_files: Mapping[str, str]
    """The files that these overrides name: path on the node, path here."""

    architecture: Architecture | None = None
    """The model's architecture; None on this machine, where the trainer looks it up."""
    offers: Prices | None = None
    """Prices; None for machines that are not rented."""
    workload: Workload | None = None
    """Rows and tokens of the training data; None for machines that are not rented."""

    @property
    def where(self) -> str:
        return ", ".join(self.infra)


@dataclass(frozen=True)
class Submission:
    """A job that is ready to launch."""

    launch: LaunchRequest
    where: str
    """The first place that is asked for, such as `A100:8 spot on gcp`."""
    limits: Limits = field(default_factory=Limits)
    """Limits of the whole run, all attempts together."""
    row: PlanRow | None = None
    """The plan's row; None for machines that are not rented."""
    reasons: tuple[str, ...] = ()
    """Why the job is like this, a line each."""
    build: BuildOptions | None = None
    """The image that must be built before a machine can start from it."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Files that are copied to the nodes: path on the node, path here."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options that choose the place, so that `--resume` repeats them."""


@dataclass(frozen=True)
class _Placement:
    """The decision where a job may run."""

    candidates: tuple[Candidate, ...]
    managed: bool
    row: PlanRow | None
    reasons: tuple[str, ...]
    envs: Mapping[str, str]
    """Prices, for the nodes."""


def prepare(
    options: SubmitOptions,
    *,
    environ: Mapping[str, str],
    now: datetime,
    prices: LoadPrices = load_prices,
    cwd: Path | None = None,
) -> Submission:
    """Return the job that the options ask for. Prices are looked up; nothing is rented or started.

    Raises:
        NoFit: no machine that can be rented fits the recipe. The message has the reasons and the alternatives.
        UserError: the recipe, the task, the settings or an option is wrong, or the nodes cannot reach the bucket.
    """
    facts = _with_look_ups(resolve(options, environ, cwd or Path.cwd()), now, prices)
    if facts.venue == "local":
        return _local_submission(facts)
    placement = _place_on_own(facts) if facts.venue == "own" else _place_on_rented(facts)
    return _cloud_submission(facts, placement)


def resolve(options: SubmitOptions, environ: Mapping[str, str], cwd: Path) -> SubmitFacts:
    """Resolve the facts that need no network; raises UserError for wrong options, recipes and settings."""
    site = settings.load(environ)
    infra = options.infra or site.infra
    venue = _venue(infra, local=LOCAL in options.infra)
    job = job_files.find_local(options.source) if venue == "local" else job_files.find(options.source)
    loaded = load(job.recipe, (*job.overrides, *options.overrides))
    owned = {"local": WHERE, "own": ", ".join(infra), "rented": None}[venue]
    limits = limits_for(site, budget_usd=options.budget_usd, deadline_h=options.deadline_h, owned=owned)
    checkpoints = canonical(options.checkpoints or site.checkpoints, cwd)
    if venue != "local":
        node_inputs.reachable_bucket(checkpoints, environ, infra, own=venue == "own")
    data, files = _copied_data(loaded.recipe, infra, venue)
    gpus = options.gpus or (job.gpus if venue == "rented" else None)
    if venue == "own":
        _check_own(options, ", ".join(infra))
    return SubmitFacts(
        options=options,
        site=site,
        environ=environ,
        infra=infra,
        venue=venue,
        job=job,
        recipe=loaded.recipe,
        notes=loaded.notes,
        run_id=checked_run_id(options.name, new=True) if options.name else default_run_id(loaded.recipe),
        checkpoints=checkpoints,
        limits=limits,
        nodes=options.nodes or int(job.base.get("num_nodes") or 1),
        gpus=parse_gpus(gpus) if gpus else (None, None),
        image=node_inputs.container(options.image, site, own=venue != "rented"),
        data_overrides=data,
        data_files=files,
    )


def _with_look_ups(facts: SubmitFacts, now: datetime, prices: LoadPrices) -> SubmitFacts:
    """Add the facts that may need the network: the model's architecture, and for rented machines prices and data."""
    if facts.venue == "local":
        return facts
    if facts.venue == "own":
        return replace(facts, architecture=find_architecture(facts.recipe))
    return replace(
        facts,
        offers=prices(now=now, infra=facts.infra, refresh=False),
        workload=find_workload(facts.recipe, rows=facts.options.rows),
        architecture=find_architecture(facts.recipe),
    )


def _copied_data(
    recipe: Recipe, infra: Sequence[str], venue: Venue
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return what `node_inputs.copied_data` does if the nodes cannot have this machine's files; refuse a model here.

    Pods and rented machines never have them.
    """
    if venue == "local" or all(_cloud_of(name) in SHARED for name in infra):
        return (), {}
    node_inputs.refuse_local_model(recipe)
    return node_inputs.copied_data(recipe)


def _check_own(options: SubmitOptions, where: str) -> None:
    """Refuse spot, which the user's own machines do not have, and a submission that does not name the GPUs."""
    if options.spot:
        raise UserError(f"{where} has no spot", hint="`--managed` recovers a lost job there, too")
    if not options.gpus or parse_gpus(options.gpus)[1] is None:
        raise UserError(f"which GPUs of {where}?", hint="`--gpus A100:8`")


def _venue(infra: Sequence[str], *, local: bool) -> Venue:
    if local:
        return "local"
    own = {_cloud_of(name) in (*skypilot.UNPRICED, "k8s") for name in infra}
    if len(own) > 1:
        raise UserError(
            f"--infra has both rented machines and machines of your own: {', '.join(infra)}",
            hint="name one kind",
        )
    return "own" if own == {True} else "rented"


def _cloud_of(infra: str) -> str:
    """Return `gcp` for `gcp/us-central1`."""
    return infra.partition("/")[0].lower()


def _place_on_own(facts: SubmitFacts) -> _Placement:
    """Place the job on the user's machines. Nothing is ranked, but a recipe that cannot fit the GPUs is refused."""
    accelerator, count = facts.gpus
    assert accelerator  # noqa: S101 (`_check_own` has refused a submission without GPUs)
    assert count  # noqa: S101
    shape = Shape(
        accelerator=accelerator,
        count=count,
        memory_gib=gpu(accelerator).memory_gib,
        cores=count,
        host_memory_gib=NO_HOST_LIMIT_GIB,
        node=facts.infra[0],
        nodes=facts.nodes,
    )
    chosen = fit(facts.recipe, shape, facts.architecture)
    reason = f"{shape} on {facts.where}: {chosen.words()}, if the host has enough memory (unknown here)"
    candidates = tuple(
        Candidate(infra=name, accelerators=f"{accelerator}:{count}", use_spot=None) for name in facts.infra
    )
    envs = node_inputs.own_price(facts.site.usd_per_h)
    return _Placement(candidates, facts.options.managed, None, (reason,), envs)


def _place_on_rented(facts: SubmitFacts) -> _Placement:
    """Place the job on the machines that the plan ranks first."""
    assert facts.offers  # noqa: S101 (`_with_look_ups` has them for rented machines)
    assert facts.workload  # noqa: S101
    accelerator, count = facts.gpus
    request = PlanRequest(
        accelerator=accelerator,
        count=count,
        nodes=facts.nodes,
        spot=facts.options.spot,
        budget_usd=facts.limits.budget_usd,
        deadline_h=facts.limits.deadline_h,
    )
    found = plan(facts.recipe, facts.architecture, facts.offers, facts.workload, request)
    chosen = found.chosen
    if chosen is None:
        raise no_fit_error(found)
    managed = facts.options.managed or chosen.spot
    reasons = [
        f"chosen: {found.why}",
        f"  {chosen.fit.words()}: ${chosen.usd:,.0f} in {chosen.hours:.1f} h expected",
        *(f"  {reason}" for reason in chosen.fit.reasons),
        f"  data: {found.workload.source}",
        f"  prices: {found.prices}",
        *(f"  {note}" for note in found.notes),
    ]
    if managed and not facts.options.managed:
        reasons.append("as a managed job: SkyPilot replaces a spot machine that is lost")
    named = bool(accelerator or facts.limits.budget_usd)
    candidates = task.candidates(found, managed=managed, asked=facts.infra, named=named)
    envs = node_inputs.price_variables(chosen, candidates, facts.offers.offers, nodes=facts.nodes)
    return _Placement(candidates, managed, chosen, tuple(reasons), envs)


def _cloud_submission(facts: SubmitFacts, placement: _Placement) -> Submission:
    """Build SkyPilot's task for a decided placement."""
    options, site, own = facts.options, facts.site, facts.venue == "own"
    recipe, mounts = node_inputs.copied_recipe(facts.job.recipe)
    save = _save_steps(placement, options.overrides)
    secrets = node_inputs.secrets(facts.job.base, facts.checkpoints, with_login(facts.environ))
    secrets |= node_inputs.login(facts.image.image, facts.environ)
    spec = TaskSpec(
        run_id=facts.run_id,
        recipe=recipe,
        checkpoints=facts.checkpoints,
        overrides=(*facts.job.overrides, *options.overrides, *facts.data_overrides, *save),
        candidates=placement.candidates,
        nodes=facts.nodes,
        image=facts.image.image,
        secrets=tuple(secrets),
        workdir=node_inputs.workdir(facts.image.image),
        mounts={**mounts, **facts.data_files},
        node_python=str(site.node_python) if own and site.node_python else None,
        # A managed job's controller gives its machine back; a cluster must go down by itself.
        autostop=not placement.managed and not own,
        envs={**placement.envs, **node_inputs.limit_variables(facts.limits)},
    )
    config = task.task_config(facts.job.base, spec)
    kind: Kind = "managed job" if placement.managed else "cluster"
    launch = LaunchRequest(
        kind=kind,
        name=str(config["name"]),
        run_id=facts.run_id,
        recipe=facts.recipe.name,
        checkpoints=facts.checkpoints,
        task=config,
        secrets=secrets,
        retry_until_up=options.retry_until_up,
    )
    interval = (f"{override}: the plan's interval for spot" for override in save)
    return Submission(
        launch=launch,
        where=spec.where,
        limits=facts.limits,
        row=placement.row,
        reasons=(*facts.notes, *placement.reasons, *interval),
        build=facts.image.build,
        mounts=spec.mounts,
        options={name: getattr(options, name) for name in REMEMBERED},
    )


def _local_submission(facts: SubmitFacts) -> Submission:
    """Build the supervisor's command for this machine."""
    variables = node_inputs.own_price(facts.site.usd_per_h) | node_inputs.limit_variables(facts.limits)
    environment = supervisor_environment(
        facts.environ, trainer_python=facts.site.trainer_python, variables=variables
    )
    command = supervisor_command(
        facts.job.recipe, facts.options.overrides, checkpoints=facts.checkpoints, run_id=facts.run_id
    )
    launch = LaunchRequest(
        kind="local",
        name=Home.of(Path(), facts.run_id, facts.checkpoints).path.name,
        run_id=facts.run_id,
        recipe=facts.job.recipe,
        checkpoints=facts.checkpoints,
        task={"run": command, "envs": environment},
    )
    return Submission(launch=launch, where=WHERE, limits=facts.limits)


def _save_steps(placement: _Placement, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the plan's interval between checkpoints on spot as an override, unless the user sets one."""
    steps = placement.row.save_steps if placement.row else None
    given = any(override.startswith("save_steps=") for override in overrides)
    return (f"save_steps={steps}",) if steps and not given else ()

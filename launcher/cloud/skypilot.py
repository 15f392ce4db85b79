"""SkyPilot, the only file that imports it, and only when asked: `import sky` takes some 7 s of CPU.

Written against 0.14.1. Its wheel holds no prices: it downloads each cloud's catalog at first use, and again
when it is older than 7 hours (`sky/catalog/common.py`, `read_catalog`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.cloud.protocol import CatalogRow, JobStatus, LaunchRequest, Say
from launcher.cloud.skypilot_errors import absent, sort_fault
from launcher.cloud.skypilot_records import LineStream, enabled_of, of_cluster, of_job
from trainer.errors import Unavailable, UserError

log = logging.getLogger(__name__)

INSTALL = 'pip install "skypilot[gcp,lambda]==0.14.1"'
PRICED = (
    "aws",
    "azure",
    "cudo",
    "do",
    "fluidstack",
    "gcp",
    "hyperbolic",
    "ibm",
    "lambda",
    "mithril",
    "nebius",
    "oci",
    "paperspace",
    "primeintellect",
    "runpod",
    "scp",
    "seeweb",
    "shadeform",
    "vast",
    "verda",
    "yotta",
)
UNPRICED = ("kubernetes", "slurm", "ssh", "vsphere")
"""What one owns: SkyPilot knows it, and no catalog has a price for it. With `PRICED`, all of SkyPilot's clouds
(`sky.skylet.constants.ALL_CLOUDS`)."""
FAULTS = (OSError, ImportError, LookupError, ValueError, AssertionError, AttributeError)
"""What a catalog fails with: the network (requests' errors are OSErrors), a cloud's missing package, and rows
that SkyPilot or pandas did not expect."""


class Fetched(NamedTuple):
    """A cloud's catalog, and what SkyPilot warned of while it was read."""

    rows: tuple[CatalogRow, ...]
    warnings: tuple[str, ...] = ()


def _fetch(infra: str) -> Fetched:
    """A cloud's catalog.

    Raises:
        UserError: SkyPilot or what it needs for this cloud is not installed.
        Unavailable: the catalog cannot be downloaded or read.
    """
    try:
        from sky import catalog
    except ImportError as error:
        raise UserError(f"SkyPilot is not installed: {error}", hint=INSTALL) from None
    except OSError as error:  # it makes folders in the home as it is imported
        raise Unavailable(f"SkyPilot cannot start: {error}") from None
    with _overheard() as warnings:
        try:
            rows = _rows(infra, catalog)
        except FAULTS as error:
            said = "; ".join(dict.fromkeys(warnings)) or f"{type(error).__name__}: {error}"
            raise Unavailable(f"SkyPilot has no prices for {infra}: {said}") from None
    return Fetched(rows, tuple(dict.fromkeys(warnings)))


def catalogs(
    infras: Sequence[str], *, timeout_s: float = 120.0, fetch: Callable[[str], Fetched] = _fetch
) -> Mapping[str, Fetched | UserError]:
    """What SkyPilot's catalogs have of machines with GPUs, by cloud; an error where one could not be had.

    SkyPilot's downloads have no timeout of their own, so they run in a thread that is left behind if they hang.
    """
    found: dict[str, Fetched | Exception] = {}
    thread = threading.Thread(target=_fetch_all, args=(tuple(infras), fetch, found), daemon=True)
    thread.start()
    thread.join(timeout_s)
    late = Unavailable(f"SkyPilot had no prices within {timeout_s:g} s", hint="is the network up?")
    answers: dict[str, Fetched | UserError] = {}
    for infra in infras:
        answer = found.get(infra, late)
        if isinstance(answer, Exception) and not isinstance(answer, UserError):
            raise answer
        answers[infra] = answer
    return answers


def _fetch_all(
    infras: Sequence[str], fetch: Callable[[str], Fetched], found: dict[str, Fetched | Exception]
) -> None:
    for infra in infras:
        try:
            found[infra] = fetch(infra)
        except Exception as error:  # noqa: BLE001 (the thread's caller raises it, unless it is the user's to mend)
            found[infra] = error


def _rows(infra: str, catalog: Any) -> tuple[CatalogRow, ...]:
    listed = catalog.list_accelerators(gpus_only=True, clouds=infra, all_regions=True)
    infos = [info for group in listed.values() for info in group]
    rows = [row for info in infos if (row := _row(infra, info))]
    if len(rows) < len(infos):
        log.debug("%s: %d of %d entries are no whole machine", infra, len(infos) - len(rows), len(infos))
    return tuple(rows + (_other_hosts(rows, catalog) if infra == "gcp" else []))


def _row(infra: str, info: Any) -> CatalogRow | None:
    """An entry of SkyPilot's; None without cores, memory or price, or with a share of a GPU."""
    price, spot = _number(info.price), _number(info.spot_price)
    cores, memory, count = _number(info.cpu_count), _number(info.memory), _number(info.accelerator_count)
    if (
        not (info.instance_type and cores and memory and count)
        or count != int(count)
        or price is spot is None
    ):
        return None
    return CatalogRow(
        infra=infra,
        region=str(info.region),
        instance_type=str(info.instance_type),
        accelerator=str(info.accelerator_name),
        gpus=int(count),
        cores=int(cores),
        host_memory_gib=memory,
        usd_per_h=price,
        spot_usd_per_h=spot,
    )


def _other_hosts(rows: Sequence[CatalogRow], catalog: Any) -> list[CatalogRow]:
    """GCP's other hosts for the same GPUs: SkyPilot lists the cheapest alone, whose memory may not do.

    An L4 comes with 16 to 128 GiB of host memory (`g2-standard-4` to `-32`). GCP prices host and accelerator
    apart; the sum is SkyPilot's own (`sky/catalog/gcp_catalog.py`, `list_accelerators`).
    """
    from sky.catalog import gcp_catalog

    listed = {row.instance_type for row in rows}
    others = [name for name in gcp_catalog.GCP_ACC_INSTANCE_TYPES if name not in listed]
    return [
        row for name in others if catalog.instance_type_exists(name, "gcp") for row in _host(name, catalog)
    ]


def _host(instance_type: str, catalog: Any) -> Iterator[CatalogRow]:
    ((accelerator, count),) = catalog.get_accelerators_from_instance_type(instance_type, "gcp").items()
    cores, memory = catalog.get_vcpus_mem_from_instance_type(instance_type, "gcp")
    places = catalog.get_region_zones_for_accelerators(accelerator, count, use_spot=False, clouds="gcp")
    having = {place.name for place in places}
    for place in catalog.get_region_zones_for_instance_type(instance_type, use_spot=False, clouds="gcp"):
        if place.name in having:
            row = CatalogRow(
                "gcp", place.name, instance_type, accelerator, count, int(cores), float(memory), None, None
            )
            price, spot = (_gcp_price(row, catalog, use_spot=use_spot) for use_spot in (False, True))
            yield row._replace(usd_per_h=price, spot_usd_per_h=spot)


def _gcp_price(row: CatalogRow, catalog: Any, *, use_spot: bool) -> float | None:
    where = {"region": row.region, "zone": None, "clouds": "gcp"}
    try:
        host = catalog.get_hourly_cost(row.instance_type, use_spot=use_spot, **where)
    except ValueError:  # SkyPilot's word for a host that has no such price there
        return None
    gpus = catalog.get_accelerator_hourly_cost(row.accelerator, row.gpus, use_spot=use_spot, **where)
    return _number(host + gpus)


def _number(value: Any) -> float | None:
    """A float of pandas', or None for its NaN; without the dust of sums."""
    return None if value is None or math.isnan(value) else round(float(value), 6)


@contextlib.contextmanager
def _overheard() -> Iterator[list[str]]:
    """What SkyPilot logs goes into the list: its own handler prints to stdout, which may be our JSON."""
    logger, heard = logging.getLogger("sky"), _Listener()
    handlers, logger.handlers = logger.handlers, [heard]
    try:
        yield heard.warnings
    finally:
        logger.handlers = handlers


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


JOB_FIELDS = (
    "job_id",
    "task_id",
    "job_name",
    "status",
    "submitted_at",
    "recovery_count",
    "failure_reason",
    "cloud",
    "region",
)
"""Of a managed job's record (`sky/schemas/api/responses.py`); all of them would bring its YAML along."""


class SkyPilot:
    """SkyPilot's API server through its Python SDK; the server is started by the SDK where it is local and down."""

    polls = False

    def launch(self, request: LaunchRequest, say: Say) -> int | None:
        if request.kind == "managed job":
            return self._launch_managed(request, say)
        with _asking(f"launch {request.name}") as sky:
            asked = sky.launch(
                _task(sky, request.task, request.secrets),
                cluster_name=request.name,
                retry_until_up=request.retry_until_up,
            )
            job_id, _ = sky.stream_and_get(asked, output_stream=LineStream(say))
        return None if job_id is None else int(job_id)

    def _launch_managed(self, request: LaunchRequest, say: Say) -> int:
        """Hand the task to the controller of managed jobs; return the job's id."""
        with _asking(f"launch the managed job {request.name}") as sky:
            asked = sky.jobs.launch(_task(sky, request.task, request.secrets), name=request.name)
            job_ids, _ = sky.stream_and_get(asked, output_stream=LineStream(say))
        if not job_ids:
            raise Unavailable(f"SkyPilot accepted the managed job {request.name} but returned no job id")
        return int(job_ids[0] if isinstance(job_ids, Sequence) else job_ids)

    def enabled(self, infra: Sequence[str]) -> Mapping[str, str | None]:
        said: list[str] = []
        with _asking(f"check {', '.join(infra)}") as sky:
            request = sky.client.sdk.check(tuple(infra), verbose=False)  # `sky.check` is a module
            found = sky.stream_and_get(request, output_stream=LineStream(said.append))
        return enabled_of(found, infra, said)

    def jobs(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        with _asking("list managed jobs") as sky:
            try:
                records, *_ = sky.get(sky.jobs.queue_v2(refresh=False, fields=list(JOB_FIELDS)))
            except sky.exceptions.ClusterNotUpError:  # no controller yet, so no job
                return {}
        ours = [record for record in records if names is None or record.job_name in names]
        newest = sorted(ours, key=lambda record: (record.job_id or 0, -(record.task_id or 0)))
        return {status.name: status for status in map(of_job, newest)}

    def clusters(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        with _asking("list clusters") as sky:
            listed = sky.get(sky.status(list(names) if names is not None else None))
            return {record.name: of_cluster(record, _job_on(sky, record)) for record in listed}

    def tried(self, status: JobStatus) -> Sequence[str]:
        said: list[str] = []
        with _asking(f"read the controller's log of {status.name}") as sky:
            sky.jobs.tail_logs(
                job_id=status.job_id, follow=False, controller=True, output_stream=LineStream(said.append)
            )
        return said

    def logs(
        self,
        status: JobStatus,
        say: Say,
        *,
        follow: bool,
        tail: int = 0,
        poll: Callable[[], bool] | None = None,  # noqa: ARG002 (SkyPilot's stream blocks)
    ) -> None:
        lines = LineStream(say)
        with _asking(f"read the log of {status.name}") as sky:
            if status.kind == "managed job":
                sky.jobs.tail_logs(
                    job_id=status.job_id, follow=follow, tail=tail or None, output_stream=lines
                )
            else:
                sky.tail_logs(status.name, status.job_id, follow, tail=tail, output_stream=lines)

    def cancel(self, status: JobStatus, say: Say) -> None:
        with _asking(f"cancel {status.name}") as sky:
            # Gracefully: SIGTERM, and only then is the machine taken away. On Slurm it is the other way round:
            # to cancel a job is SIGKILL to its step, while the end of the allocation begins with SIGTERM.
            slurm = status.cloud == "slurm"
            if status.kind == "managed job":
                request = sky.jobs.cancel(job_ids=[status.job_id], graceful=not slurm)
            elif slurm:
                request = sky.down(status.name)
            else:
                request = sky.cancel(status.name, all=True)
            sky.stream_and_get(request, output_stream=LineStream(say))

    def down(self, name: str, say: Say) -> None:
        with _asking(f"take {name} down") as sky:
            sky.stream_and_get(sky.down(name), output_stream=LineStream(say))


def accepts(config: Mapping[str, Any], secrets: Mapping[str, str]) -> None:
    """Have SkyPilot itself check a task, with no server and nothing sent; raises UserError."""
    with _asking(f"check the task {config.get('name')}") as sky:
        _task(sky, config, secrets)


@contextlib.contextmanager
def _asking(doing: str) -> Iterator[Any]:
    """SkyPilot, its faults as ours; what it prints goes to stderr: stdout may be our JSON."""
    try:
        import sky
        import sky.exceptions
        import sky.jobs
    except ImportError as error:
        raise UserError(f"SkyPilot is not installed: {error}", hint=INSTALL) from None
    except OSError as error:  # as above
        raise UserError(f"SkyPilot cannot start: {error}") from None
    try:
        with _overheard(), contextlib.redirect_stdout(sys.stderr):
            yield sky
    except UserError:
        raise
    except Exception as error:  # the server's faults come in any class; what we do not know is raised again
        if told := sort_fault(error, doing):
            raise told from None
        raise


def _task(sky: Any, config: Mapping[str, Any], secrets: Mapping[str, str]) -> Any:
    """SkyPilot takes a config apart as it reads it, and keeps its text: values of secrets come separately."""
    return sky.Task.from_yaml_config(
        copy.deepcopy(dict(config)), secrets_overrides=list(secrets.items()) or None
    )


def _job_on(sky: Any, record: Any) -> tuple[int | None, str] | None:
    """The last job on a cluster: its id and status; None where there is none or nobody answers."""
    if record.status.value != "UP":
        return None
    try:
        found = sky.get(sky.job_status(record.name))
    except (sky.exceptions.ClusterNotUpError, sky.exceptions.CommandError):  # it goes down just now
        return None
    except Exception as error:  # as above
        if absent(error):
            return None
        raise
    ((job_id, status),) = found.items()
    return None if status is None else (job_id, status.value)

"""The SkyPilot backend and its price catalogs.

This is the only file that imports SkyPilot. The imports are inside functions, because `import sky` takes about 7 s
of CPU. The code is written for 0.14.1. SkyPilot's wheel contains no prices: it downloads the catalog of a cloud at
the first use, and again when it is older than 7 hours (`sky/catalog/common.py`, `read_catalog`).
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
"""Infrastructure that the user owns, so that no catalog has a price for it. `PRICED` and `UNPRICED` together are all
of SkyPilot's clouds (`sky.skylet.constants.ALL_CLOUDS`)."""
FAULTS = (OSError, ImportError, LookupError, ValueError, AssertionError, AttributeError)
"""Errors of a catalog: the network (the errors of requests are OSErrors), a missing package of a cloud, or rows that
SkyPilot or pandas did not expect."""


class Fetched(NamedTuple):
    """The catalog of a cloud, and SkyPilot's warnings while it was read."""

    rows: tuple[CatalogRow, ...]
    warnings: tuple[str, ...] = ()


def _fetch(infra: str) -> Fetched:
    """Return the catalog of a cloud.

    Raises:
        UserError: SkyPilot, or a package that it needs for this cloud, is not installed.
        Unavailable: the catalog cannot be downloaded or read.
    """
    try:
        from sky import catalog
    except ImportError as error:
        raise UserError(f"SkyPilot is not installed: {error}", hint=INSTALL) from None
    except OSError as error:  # its import makes folders in the home folder
        raise Unavailable(f"SkyPilot cannot start: {error}") from None
    with _captured_log() as warnings:
        try:
            rows = _rows(infra, catalog)
        except FAULTS as error:
            reason = "; ".join(dict.fromkeys(warnings)) or f"{type(error).__name__}: {error}"
            raise Unavailable(f"SkyPilot has no prices for {infra}: {reason}") from None
    return Fetched(rows, tuple(dict.fromkeys(warnings)))


def catalogs(
    infras: Sequence[str], *, timeout_s: float = 120.0, fetch: Callable[[str], Fetched] = _fetch
) -> Mapping[str, Fetched | UserError]:
    """Return the machines with GPUs in SkyPilot's catalogs, by cloud, or the error of a cloud.

    SkyPilot's downloads have no timeout, so they run in a thread that is abandoned if they hang.
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
        except Exception as error:  # noqa: BLE001 (the thread's caller raises it, unless it is a UserError)
            found[infra] = error


def _rows(infra: str, catalog: Any) -> tuple[CatalogRow, ...]:
    listed = catalog.list_accelerators(gpus_only=True, clouds=infra, all_regions=True)
    infos = [info for group in listed.values() for info in group]
    rows = [row for info in infos if (row := _row(infra, info))]
    if len(rows) < len(infos):
        log.debug(
            "%s: ignored %d of %d catalog entries: they lack a size or a price, or have only a share of a GPU",
            infra,
            len(infos) - len(rows),
            len(infos),
        )
    return tuple(rows + (_other_hosts(rows, catalog) if infra == "gcp" else []))


def _row(infra: str, info: Any) -> CatalogRow | None:
    """Return SkyPilot's entry as a row; None if it has no cores, memory or price, or only a share of a GPU."""
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
    """Return GCP's other hosts for the same GPUs. SkyPilot lists only the cheapest, whose memory may be too small.

    An L4 comes with 16 to 128 GiB of host memory (`g2-standard-4` to `-32`). GCP has separate prices for host and
    accelerator; they are added as SkyPilot does it (`sky/catalog/gcp_catalog.py`, `list_accelerators`).
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
    except ValueError:  # raised if the host has no such price in this region
        return None
    gpus = catalog.get_accelerator_hourly_cost(row.accelerator, row.gpus, use_spot=use_spot, **where)
    return _number(host + gpus)


def _number(value: Any) -> float | None:
    """Return a pandas float without the rounding errors of sums; None for NaN."""
    return None if value is None or math.isnan(value) else round(float(value), 6)


@contextlib.contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collect SkyPilot's log in a list. Its own handler prints to stdout, which may carry our JSON."""
    logger, collector = logging.getLogger("sky"), _WarningCollector()
    handlers, logger.handlers = logger.handlers, [collector]
    try:
        yield collector.warnings
    finally:
        logger.handlers = handlers


class _WarningCollector(logging.Handler):
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
"""Fields of a managed job's record (`sky/schemas/api/responses.py`) to ask for; the full record includes its YAML."""


class SkyPilot:
    """Implements `Cloud` with SkyPilot's Python SDK. The SDK starts a local API server that is not running."""

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
        report: list[str] = []
        with _asking(f"check {', '.join(infra)}") as sky:
            request = sky.client.sdk.check(tuple(infra), verbose=False)  # `sky.check` is a module
            found = sky.stream_and_get(request, output_stream=LineStream(report.append))
        return enabled_of(found, infra, report)

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
        lines: list[str] = []
        with _asking(f"read the controller's log of {status.name}") as sky:
            sky.jobs.tail_logs(
                job_id=status.job_id, follow=False, controller=True, output_stream=LineStream(lines.append)
            )
        return lines

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
            # A graceful cancel sends SIGTERM before the machine is taken away. On Slurm, cancelling a job sends
            # SIGKILL to its step, while ending the allocation begins with SIGTERM.
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
    """Let SkyPilot check a task, without a server; raises UserError."""
    with _asking(f"check the task {config.get('name')}") as sky:
        _task(sky, config, secrets)


@contextlib.contextmanager
def _asking(doing: str) -> Iterator[Any]:
    """Yield SkyPilot, and raise its errors as ours. What it prints goes to stderr, because stdout may carry our JSON."""
    try:
        import sky
        import sky.exceptions
        import sky.jobs
    except ImportError as error:
        raise UserError(f"SkyPilot is not installed: {error}", hint=INSTALL) from None
    except OSError as error:  # as above
        raise UserError(f"SkyPilot cannot start: {error}") from None
    try:
        with _captured_log(), contextlib.redirect_stdout(sys.stderr):
            yield sky
    except UserError:
        raise
    except Exception as error:  # the server raises errors of any class; unknown ones are raised again
        if known := sort_fault(error, doing):
            raise known from None
        raise


def _task(sky: Any, config: Mapping[str, Any], secrets: Mapping[str, str]) -> Any:
    """Return SkyPilot's task.

    SkyPilot changes the config that it reads, so it gets a copy. It also stores the config as text, so secrets are not in
    the config, but are passed separately.
    """
    return sky.Task.from_yaml_config(
        copy.deepcopy(dict(config)), secrets_overrides=list(secrets.items()) or None
    )


def _job_on(sky: Any, record: Any) -> tuple[int | None, str] | None:
    """Return the id and status of the newest job on a cluster; None if it has none, or does not answer."""
    if record.status.value != "UP":
        return None
    try:
        found = sky.get(sky.job_status(record.name))
    except (sky.exceptions.ClusterNotUpError, sky.exceptions.CommandError):  # it is going down
        return None
    except Exception as error:  # as above
        if absent(error):
            return None
        raise
    ((job_id, status),) = found.items()
    return None if status is None else (job_id, status.value)

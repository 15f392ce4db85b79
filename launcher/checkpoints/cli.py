"""`launcher checkpoints`: the command line. Slow imports are inside the functions that need them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import terminal
from trainer.errors import ExitCode, UserError
from trainer.options import DurationParam

if TYPE_CHECKING:
    from launcher.checkpoints.inspect import CheckpointStatus, Survey, VerifyResult
    from launcher.checkpoints.pull import Pulled
    from trainer.bucket import Bucket

CHECKED = "Exit codes: 0 all verified; 1 a file did not verify; 2 the command or the address is invalid."
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
step_option = click.option("--step", type=click.IntRange(min=0), help="Only the checkpoint of this step.")


@click.group(short_help="List, verify, pull and prune checkpoints.")
def checkpoints() -> None:
    """List, verify, pull and prune the checkpoints that a run has committed.

    URI is the address of the run, which ends with the run id: gs://bucket/runs/my-run, s3://…, or a folder.
    """


@checkpoints.command("list", short_help="List the committed checkpoints.")
@click.argument("uri")
@step_option
@json_option
def list_command(uri: str, step: int | None, as_json: bool) -> None:
    """List the checkpoints of the run at URI, newest first; files are checked for existence and size only."""
    from launcher import render
    from launcher.checkpoints.inspect import survey

    bucket = _find(uri)
    found = survey(bucket)
    statuses = _choose(found, step, final=False)
    uncommitted = {"files": len(found.uncommitted), "bytes": sum(item.size for item in found.uncommitted)}
    if as_json:
        rows = [status.as_dict() for status in statuses]
        click.echo(render.to_json({**_run_fields(bucket), "checkpoints": rows, "uncommitted": uncommitted}))
        return
    if statuses:
        columns = ("step", "kind", "attempt", "created", "files", "size", "world", "engine", "state")
        terminal.stdout().print(render.list_table(columns, map(_cells, statuses)))
    else:
        click.echo("nothing is committed yet")
    if uncommitted["files"]:
        click.echo(
            f"uncommitted: {uncommitted['files']} files, {render.size(uncommitted['bytes'])},"
            " from an upload in progress or a lost machine"
        )


@checkpoints.command(epilog=CHECKED, short_help="Read every byte and compare the checksums.")
@click.argument("uri")
@step_option
@click.option("--final", is_flag=True, help="Only the final model.")
@json_option
def verify(uri: str, step: int | None, final: bool, as_json: bool) -> int:
    """Read every byte of the run at URI and compare it with the sizes and checksums; nothing is written."""
    from launcher import render
    from launcher.checkpoints.inspect import survey
    from launcher.checkpoints.inspect import verify as verify_bytes
    from launcher.checkpoints.pull import bar

    bucket = _find(uri)
    statuses = _choose(survey(bucket), step, final=final)
    if not statuses:
        raise UserError(
            f"nothing is committed in {bucket.uri}, so there is nothing to verify",
            hint="the first checkpoint is committed after `save_steps` steps",
        )
    total = sum(status.manifest.size for status in statuses if status.manifest and not status.is_unknown)
    with bar(terminal.stderr(), "verifying", total) as on_bytes:
        results = verify_bytes(bucket, statuses, on_bytes)
    failed = any(result.state in ("broken", "unknown") for result in results)
    if as_json:
        rows = [_result_fields(result) for result in results]
        click.echo(render.to_json({**_run_fields(bucket), "verified": not failed, "checkpoints": rows}))
    else:
        _print_results(results)
    return ExitCode.BUG if failed else ExitCode.DONE


@checkpoints.command(epilog=CHECKED, short_help="Download a checkpoint into a folder.")
@click.argument("uri")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: newest]")
@click.option("--final", is_flag=True, help="The final model.")
@json_option
def pull(uri: str, dest: Path, step: int | None, final: bool, as_json: bool) -> int:
    """Download a checkpoint of the run at URI into the folder DEST.

    Every file is verified during the download. To resume an interrupted pull, repeat the same command:
    files that exist with the right size and checksum are not downloaded again.
    """
    from launcher.checkpoints import pull as pulling
    from launcher.checkpoints.inspect import choose, survey
    from launcher.checkpoints.pull import bar

    if final and step is not None:
        raise click.UsageError("--final and --step cannot be used together")
    bucket = _find(uri)
    ticket = pulling.read_ticket(dest)
    if ticket and ticket.uri == bucket.uri and step is None and not final and ticket.kind == "checkpoint":
        step = ticket.step  # a newer checkpoint may exist by now, but the command resumes this one
    chosen = choose(survey(bucket), step=step, final=final)
    if chosen.manifest:
        chosen.manifest.refuse_unknown()
    if chosen.manifest is None or chosen.fault:
        raise UserError(
            f"the {chosen.kind} of step {chosen.step} is broken: {chosen.fault}",
            hint="`launcher checkpoints list` shows which ones are whole",
        )
    try:
        with bar(terminal.stderr(), f"step {chosen.step}", chosen.manifest.size) as on_bytes:
            pulled = pulling.pull(bucket, chosen.manifest, dest, on_bytes)
    except KeyboardInterrupt:
        click.echo("interrupted; repeat the command to resume", err=True)
        raise
    _print_pulled(bucket, pulled, as_json=as_json)
    return ExitCode.BUG if pulled.failures else ExitCode.DONE


@checkpoints.command(short_help="Delete old checkpoints or cached references.")
@click.argument("uri")
@click.option("--keep", type=click.IntRange(min=2), help="Number of newest checkpoints to keep, at least 2.")
@click.option(
    "--references",
    is_flag=True,
    help="Delete cached DPO reference log-probabilities; URI is the folder of runs.",
)
@click.option(
    "--older-than",
    type=DurationParam(),
    metavar="TIME",
    help="Minimum age of references: 90m, 24h, 2d.  [default: 7d]",
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option
def prune(
    uri: str, keep: int | None, references: bool, older_than: float | None, yes: bool, as_json: bool
) -> None:
    """Delete old checkpoints of the run at URI, and uncommitted files that lost machines left.

    Without --yes it shows what it would delete, and on a terminal it asks. It never deletes the newest two
    whole checkpoints or the final model. It is safe while the run is running: it deletes what the newest
    attempt's own retention would delete, manifests before files.

    With --references it deletes cached log-probabilities of DPO reference models that are older than
    --older-than, if every run of the folder URI with the same model and data has its final model.
    """
    if references == (keep is not None) or (older_than is not None and not references):
        raise click.UsageError(
            "use `--keep N` for a run, or `--references [--older-than TIME]` for a folder of runs"
        )
    from launcher.checkpoints.prune import (
        REFERENCES_OLDER_THAN_H,
        prune_checkpoints,
        prune_references,
    )

    if keep is not None:
        prune_checkpoints(_find(uri), keep, yes=yes, as_json=as_json)
    else:
        prune_references(uri, older_than or REFERENCES_OLDER_THAN_H, yes=yes, as_json=as_json)


def _find(uri: str) -> Bucket:
    from launcher.checkpoints.inspect import find

    return find(uri, Path.cwd())


def _run_fields(bucket: Bucket) -> dict[str, Any]:
    return {"run": bucket.run_id, "uri": bucket.uri}


def _choose(found: Survey, step: int | None, *, final: bool) -> Sequence[CheckpointStatus]:
    from launcher.checkpoints.inspect import choose

    if step is None and not final:
        return found.statuses
    chosen = [choose(found, step=step)] if step is not None else []
    return [choose(found, final=True), *chosen] if final else chosen


def _cells(status: CheckpointStatus) -> list[str]:
    from launcher import render

    row = status.as_dict()
    created = status.manifest.created.strftime("%Y-%m-%d %H:%M:%S") if status.manifest else ""
    size = render.size(row["bytes"]) if status.manifest else ""
    names = ("step", "kind", "attempt", "created", "files", "size", "world_size", "engine", "state")
    values = {**row, "created": created, "size": size}
    if status.fault:
        values["state"] = f"{status.state}: {status.fault}"
    return [str(values[name]) if values[name] is not None else "" for name in names]


def _result_fields(result: VerifyResult) -> dict[str, Any]:
    row = result.status.as_dict()
    fields = {name: row[name] for name in ("step", "kind", "attempt", "files", "bytes")}
    return {**fields, "state": result.state, "failures": result.failures}


def _print_results(results: Sequence[VerifyResult]) -> None:
    from launcher import render

    rows = [[*_cells(result.status)[:3], *_cells(result.status)[4:6], result.state] for result in results]
    terminal.stdout().print(render.list_table(("step", "kind", "attempt", "files", "size", "state"), rows))
    for result in results:
        for reason in result.failures:
            click.echo(f"{'deleted during the check' if result.gone else result.state}: {reason}")


def _print_pulled(bucket: Bucket, pulled: Pulled, *, as_json: bool) -> None:
    from launcher import render

    manifest, fetched_bytes = pulled.manifest, sum(file.size for file in pulled.fetched)
    if as_json:
        fields = {
            "kind": manifest.kind,
            "step": manifest.step,
            "path": str(pulled.path),
            "files": len(manifest.files),
            "bytes": manifest.size,
            "fetched_files": len(pulled.fetched),
            "fetched_bytes": fetched_bytes,
            "seconds": pulled.seconds,
            "failures": pulled.failures,
        }
        click.echo(render.to_json({**_run_fields(bucket), **fields}))
        return
    for reason in pulled.failures:
        click.echo(f"broken: {reason}", err=True)
    rate = render.size(fetched_bytes / max(pulled.seconds, 1e-9))
    volume = f"{render.size(fetched_bytes)} in {render.duration(pulled.seconds)}, {rate}/s"
    rows = [
        ("what", f"{manifest.kind} of step {manifest.step}, committed by attempt {manifest.attempt}"),
        ("downloaded", f"{len(pulled.fetched)} files, {volume}"),
        ("already present", f"{len(manifest.files) - len(pulled.fetched)} files"),
        ("folder", f"{pulled.path}" + (" (incomplete)" if pulled.failures else "")),
    ]
    terminal.stdout().print(render.facts_table(rows, title=bucket.run_id))

"""`launcher checkpoints`: parse, call, print. Whatever weighs something is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import terminal
from trainer.durations import DurationParam
from trainer.errors import ExitCode, UserError

if TYPE_CHECKING:
    from launcher.checkpoints.inspect import CheckpointStatus, Survey, VerifyResult
    from launcher.checkpoints.pull import Pulled
    from trainer.bucket import Bucket

CHECKED = "Exit codes: 0 all verified; 1 something did not verify; 2 the command or the address is wrong."
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
step_option = click.option("--step", type=click.IntRange(min=0), help="Of this step only.")


@click.group(short_help="List, verify, fetch and prune what was committed.")
def checkpoints() -> None:
    """List, verify, fetch and prune what a run has committed.

    URI is the run's own address, the run id last: gs://bucket/runs/my-run, s3://…, or a folder.
    """


@checkpoints.command("list")
@click.argument("uri")
@step_option
@json_option
def list_command(uri: str, step: int | None, as_json: bool) -> None:
    """The checkpoints of the run at URI, newest first, judged by their manifests and a listing."""
    from launcher import render
    from launcher.checkpoints.inspect import survey

    bucket = _find(uri)
    found = survey(bucket)
    standings = _chosen(found, step, final=False)
    left = {"files": len(found.uncommitted), "bytes": sum(item.size for item in found.uncommitted)}
    if as_json:
        rows = [standing.as_dict() for standing in standings]
        click.echo(render.to_json({**_about(bucket), "checkpoints": rows, "uncommitted": left}))
        return
    if standings:
        columns = ("step", "kind", "attempt", "created", "files", "size", "world", "engine", "state")
        terminal.stdout().print(render.list_table(columns, map(_cells, standings)))
    else:
        click.echo("nothing is committed yet")
    if left["files"]:
        click.echo(
            f"uncommitted: {left['files']} files, {render.size(left['bytes'])},"
            " of an upload on its way or of a machine that was lost"
        )


@checkpoints.command(epilog=CHECKED)
@click.argument("uri")
@step_option
@click.option("--final", is_flag=True, help="The final model only.")
@json_option
def verify(uri: str, step: int | None, final: bool, as_json: bool) -> int:
    """Read every byte of the run at URI, without writing any, against sizes and checksums."""
    from launcher import render
    from launcher.checkpoints.inspect import survey
    from launcher.checkpoints.inspect import verify as read_all
    from launcher.checkpoints.pull import bar

    bucket = _find(uri)
    standings = _chosen(survey(bucket), step, final=final)
    if not standings:
        raise UserError(f"nothing is committed in {bucket.uri}, so there is nothing to verify")
    total = sum(standing.manifest.size for standing in standings if standing.manifest)
    with bar(terminal.stderr(), "verifying", total) as tell:
        verdicts = read_all(bucket, standings, tell)
    bad = any(verdict.state == "broken" for verdict in verdicts)
    if as_json:
        rows = [_judged(verdict) for verdict in verdicts]
        click.echo(render.to_json({**_about(bucket), "verified": not bad, "checkpoints": rows}))
    else:
        _show_verdicts(verdicts)
    return ExitCode.BUG if bad else ExitCode.DONE


@checkpoints.command(epilog=CHECKED)
@click.argument("uri")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: newest]")
@click.option("--final", is_flag=True, help="The final model.")
@json_option
def pull(uri: str, dest: Path, step: int | None, final: bool, as_json: bool) -> int:
    """Bring a checkpoint of the run at URI to the folder DEST.

    Every file is checked on the way. A pull that was cut off goes on with the same command: what is
    there with size and checksum is not fetched again.
    """
    from launcher.checkpoints import pull as pulling
    from launcher.checkpoints.inspect import choose, survey
    from launcher.checkpoints.pull import bar

    if final and step is not None:
        raise click.UsageError("--final and --step are two different things: leave one out")
    bucket = _find(uri)
    part = pulling.begun(dest)
    if part and part.uri == bucket.uri and step is None and not final and part.kind == "checkpoint":
        step = part.step  # the newest may be another by now; the same command still means this one
    chosen = choose(survey(bucket), step=step, final=final)
    if chosen.manifest is None or chosen.fault:
        raise UserError(
            f"{chosen.kind} of step {chosen.step} is broken: {chosen.fault}", hint="see `checkpoints list`"
        )
    try:
        with bar(terminal.stderr(), f"step {chosen.step}", chosen.manifest.size) as tell:
            pulled = pulling.pull(bucket, chosen.manifest, dest, tell)
    except KeyboardInterrupt:
        click.echo("cut off; the same command goes on from here", err=True)
        raise
    _show_pulled(bucket, pulled, as_json=as_json)
    return ExitCode.BUG if pulled.failures else ExitCode.DONE


@checkpoints.command()
@click.argument("uri")
@click.option("--keep", type=click.IntRange(min=2), help="How many of the newest stay, at least 2.")
@click.option(
    "--references", is_flag=True, help="What DPO's runs keep beside them; URI is the folder of runs."
)
@click.option(
    "--older-than", type=DurationParam(), metavar="TIME", help="Of references, 90m, 24h, 2d.  [default: 7d]"
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option
def prune(
    uri: str, keep: int | None, references: bool, older_than: float | None, yes: bool, as_json: bool
) -> None:
    """Delete old checkpoints of the run at URI, and what lost machines left below the newest.

    Without --yes it shows what would go, and asks on a terminal. It deletes what the newest attempt's
    own retention would, manifests before files, so it may be done while the run is at work; never the
    newest two whole checkpoints, never the final model.

    With --references, log-probabilities of DPO's references that are older than --older-than and that
    no run of the folder URI can use any more: each that has such a model and data has its final model.
    """
    if references == (keep is not None) or (older_than is not None and not references):
        raise click.UsageError(
            "say `--keep N` of a run, or `--references [--older-than TIME]` of a folder of runs"
        )
    from launcher.checkpoints import pruning

    if keep is not None:
        pruning.prune_checkpoints(_find(uri), keep, yes=yes, as_json=as_json)
    else:
        older_than_h = older_than or pruning.REFERENCES_OLDER_THAN_H
        pruning.prune_references(uri, older_than_h, yes=yes, as_json=as_json)


def _find(uri: str) -> Bucket:
    from launcher.checkpoints.inspect import find

    return find(uri, Path.cwd())


def _about(bucket: Bucket) -> dict[str, Any]:
    return {"run": bucket.run_id, "uri": bucket.uri}


def _chosen(found: Survey, step: int | None, *, final: bool) -> Sequence[CheckpointStatus]:
    from launcher.checkpoints.inspect import choose

    if step is None and not final:
        return found.standings
    chosen = [choose(found, step=step)] if step is not None else []
    return [choose(found, final=True), *chosen] if final else chosen


def _cells(standing: CheckpointStatus) -> list[str]:
    from launcher import render

    row = standing.as_dict()
    created = standing.manifest.created.strftime("%Y-%m-%d %H:%M:%S") if standing.manifest else ""
    size = render.size(row["bytes"]) if standing.manifest else ""
    names = ("step", "kind", "attempt", "created", "files", "size", "world_size", "engine", "state")
    values = {**row, "created": created, "size": size}
    if standing.fault:
        values["state"] = f"broken: {standing.fault}"
    return [str(values[name]) if values[name] is not None else "" for name in names]


def _judged(verdict: VerifyResult) -> dict[str, Any]:
    row = verdict.standing.as_dict()
    kept = {name: row[name] for name in ("step", "kind", "attempt", "files", "bytes")}
    return {**kept, "state": verdict.state, "failures": verdict.failures}


def _show_verdicts(verdicts: Sequence[VerifyResult]) -> None:
    from launcher import render

    rows = [
        [*_cells(verdict.standing)[:3], *_cells(verdict.standing)[4:6], verdict.state] for verdict in verdicts
    ]
    terminal.stdout().print(render.list_table(("step", "kind", "attempt", "files", "size", "state"), rows))
    for verdict in verdicts:
        for reason in verdict.failures:
            click.echo(f"{'gone meanwhile' if verdict.gone else 'broken'}: {reason}")


def _show_pulled(bucket: Bucket, pulled: Pulled, *, as_json: bool) -> None:
    from launcher import render

    about, brought = pulled.manifest, sum(file.size for file in pulled.fetched)
    there = len(about.files) - len(pulled.fetched)
    if as_json:
        told = {"kind": about.kind, "step": about.step, "path": str(pulled.path), "files": len(about.files)}
        fetched = {"fetched_files": len(pulled.fetched), "fetched_bytes": brought, "seconds": pulled.seconds}
        click.echo(
            render.to_json(
                {**_about(bucket), **told, "bytes": about.size, **fetched, "failures": pulled.failures}
            )
        )
        return
    for reason in pulled.failures:
        click.echo(f"broken: {reason}", err=True)
    rate = render.size(brought / max(pulled.seconds, 1e-9))
    rows = [
        ("what", f"{about.kind} of step {about.step}, committed by attempt {about.attempt}"),
        (
            "brought",
            f"{len(pulled.fetched)} files, {render.size(brought)} in {render.duration(pulled.seconds)}, {rate}/s",
        ),
        ("there already", f"{there} files"),
        ("where", f"{pulled.path}" + (" (not complete)" if pulled.failures else "")),
    ]
    terminal.stdout().print(render.facts_table(rows, title=bucket.run_id))

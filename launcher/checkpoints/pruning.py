"""What `launcher checkpoints prune` says, asks and has done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click

from launcher import render
from launcher.checkpoints import inspect, references
from trainer.bucket import Bucket

REFERENCES_OLDER_THAN_H = 7 * 24.0
"""So that the next run of a series need not compute what the last one had."""


def prune_checkpoints(bucket: Bucket, keep: int, *, yes: bool, as_json: bool) -> None:
    """Of a run, all but the newest `keep`; and what lost machines left."""
    attempt = inspect.newest_attempt(bucket)
    old = inspect.prunable(bucket, attempt, keep)
    what = (
        f"{len(old.steps)} checkpoints (steps {_listed(old.steps)}), {len(old.keys)} files,"
        f" {render.size(old.bytes)}; steps {_listed(old.kept)} stay"
    )
    anything = bool(old.steps or old.keys)
    sure = anything and _agreed(what, yes=yes, as_json=as_json)
    if sure:
        inspect.prune(bucket, attempt, keep)
    if as_json:
        told = {"steps": old.steps, "files": len(old.keys), "bytes": old.bytes, "kept": old.kept}
        click.echo(render.to_json({"run": bucket.run_id, "uri": bucket.uri, **told, "deleted": sure}))
    else:
        _tell_pruned(what if anything else None, f"steps {_listed(old.kept)} stay", sure=sure)


def prune_references(uri: str, older_than_h: float, *, yes: bool, as_json: bool) -> None:
    """Of a folder of runs, what `references.survey` says that none of them needs."""
    runs, older_than = references.find_runs(uri, Path.cwd()), timedelta(hours=older_than_h)
    found = references.survey(runs, older_than)
    old = found.unused
    files, size = sum(len(kept.entry.objects) for kept in old), sum(kept.bytes for kept in old)
    stay = f"{len(found.needed)} stay"
    of = ", ".join(sorted({kept.entry.run_id for kept in old}))
    what = f"{len(old)} references (of {of}), {files} files, {render.size(size)}; {stay}"
    sure = bool(old) and _agreed(what, yes=yes, as_json=as_json)
    if sure:
        references.prune(runs, old, older_than)
    if as_json:
        told = {"references": [kept.as_dict() for kept in old], "files": files, "bytes": size}
        click.echo(render.to_json({"uri": runs, **told, "kept": len(found.needed), "deleted": sure}))
    else:
        _tell_pruned(what if old else None, stay, sure=sure)


def _agreed(what: str, *, yes: bool, as_json: bool) -> bool:
    """Whether it is to be deleted: it was said beforehand, or is said now."""
    if yes or as_json or not sys.stdin.isatty():
        return yes
    return click.confirm(f"delete {what}?", err=True)


def _tell_pruned(what: str | None, stay: str, *, sure: bool) -> None:
    if what is None:
        click.echo(f"nothing to delete; {stay}")
    else:
        click.echo(f"deleted {what}" if sure else f"would delete {what}\nnothing was deleted: add --yes")


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"

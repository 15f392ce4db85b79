"""Check that a recipe's model and data are available on this machine, in a bucket or on the Hub, and the Hub token."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from launcher.doctor.findings import Finding
from trainer.architecture.lookup import HUB, TOKEN
from trainer.bucket import open_file
from trainer.errors import UserError
from trainer.recipe import DataSource, Recipe

TIMEOUT_S = 10.0
GET_TOKEN = (
    "create one at https://huggingface.co/settings/tokens, and `export HF_TOKEN=hf_…`, or `hf auth login`"  # noqa: S105
)
GATED = "accept its terms on the Hub, and set $HF_TOKEN to your token; or check its name"


class HubAnswer(NamedTuple):
    """The HTTP status of an answer; 0 if there was no answer."""

    code: int
    why: str = ""
    """The reason for code 0."""


def endpoint(environ: Mapping[str, str]) -> str:
    return (environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def check_token(environ: Mapping[str, str]) -> Finding:
    """Check that the Hub accepts the token; with a wrong one it refuses public downloads too."""
    if not environ.get(TOKEN):
        return Finding(
            name="Hub token",
            status="missing",
            detail=f"${TOKEN} is not set: only public models and data are available, at a lower rate limit",
            hint=GET_TOKEN,
            needed=False,
        )
    answer = _ask("GET", "/api/whoami-v2", environ)
    if answer.code == 200:
        return Finding(name="Hub token", status="ok", detail=f"{endpoint(environ)} accepts it")
    if answer.code in (401, 403):
        detail = f"{endpoint(environ)} refuses ${TOKEN} ({answer.code})"
        return Finding(name="Hub token", status="failed", detail=detail, hint=GET_TOKEN)
    detail = f"${TOKEN} is set, but {endpoint(environ)} could not verify it: {_why(answer)}"
    return Finding(name="Hub token", status="skipped", detail=detail, needed=False)


def check_model(recipe: Recipe, environ: Mapping[str, str]) -> Finding:
    """Check that the model which the recipe starts from is available."""
    name = recipe.model_name_or_path
    if name is None:
        return _ok("model", "init: tiny, created from the recipe's data")
    if "://" in name:
        return _model_in_bucket(name)
    if Path(name).is_absolute() or name.endswith(".gguf"):
        return _local_path("model", name)
    revision = str(recipe.model_args.get("model_revision") or "main")
    answer = HubAnswer(0)
    for file in ("config.json", "adapter_config.json"):
        answer = _ask("HEAD", f"/{name}/resolve/{urllib.parse.quote(revision, safe='')}/{file}", environ)
        if answer.code != 404:
            break
    return _on_hub("model", name, answer, environ)


def check_data(source: DataSource, environ: Mapping[str, str]) -> Finding:
    """Check that one of the recipe's data sets is available."""
    if source.id.startswith("generated:"):
        return _ok("data", f"{source.id}, generated on the node")
    if Path(source.id).is_absolute():
        return _local_path("data", source.id)
    if "://" in source.id:
        bucket, key = open_file(source.id)
        if bucket.size(key) is not None:
            return _ok("data", source.id)
        detail, hint = f"{source.id} does not exist", "check its spelling"
        return Finding(name="data", status="missing", detail=detail, hint=hint)
    revision = f"/revision/{urllib.parse.quote(source.revision, safe='')}" if source.revision else ""
    answer = _ask("GET", f"/api/datasets/{source.id}{revision}", environ)
    return _on_hub("data", source.id, answer, environ)


def _on_hub(what: str, name: str, answer: HubAnswer, environ: Mapping[str, str]) -> Finding:
    if 200 <= answer.code < 400:
        return _ok(what, f"{name}, on {endpoint(environ)}")
    if answer.code in (401, 403):
        detail = f"{endpoint(environ)} denies access to {name} ({answer.code})"
        return Finding(name=what, status="failed", detail=detail, hint=GATED)
    if answer.code == 404:
        detail = f"{endpoint(environ)} has no {what} {name}"
        return Finding(name=what, status="missing", detail=detail, hint="check its name in the recipe")
    detail = f"{name} could not be checked: {endpoint(environ)}: {_why(answer)}"
    hint = "check the network connection, or set $HF_ENDPOINT to a mirror"
    return Finding(name=what, status="failed", detail=detail, hint=hint)


def _model_in_bucket(name: str) -> Finding:
    from trainer.bucket.restore import find_exported

    try:
        _bucket, manifest = find_exported(name)
    except UserError as error:
        return Finding(name="model", status="missing", detail=error.message, hint=error.hint)
    return _ok("model", f"{name}, {manifest.size / 1e6:,.1f} MB")


def _local_path(what: str, name: str) -> Finding:
    if Path(name).expanduser().exists():
        return _ok(what, name)
    detail, hint = f"{name} does not exist", "check the path in the recipe"
    return Finding(name=what, status="missing", detail=detail, hint=hint)


def _ok(what: str, detail: str) -> Finding:
    return Finding(name=what, status="ok", detail=detail)


def _why(answer: HubAnswer) -> str:
    return answer.why or f"HTTP status {answer.code}"


def _ask(method: str, path: str, environ: Mapping[str, str]) -> HubAnswer:
    """Return the status of an answer. A redirect to a file's location is not followed: it proves that the file exists."""
    url = endpoint(environ) + path
    if not url.startswith(("https://", "http://")):
        return HubAnswer(0, f"{url} is not an http(s) address")
    headers = {"Authorization": f"Bearer {environ[TOKEN]}"} if environ.get(TOKEN) else {}
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310 (checked above)
    opener = urllib.request.build_opener(_NoRedirect())
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return HubAnswer(int(answer.status))
    except urllib.error.HTTPError as error:
        error.close()
        return HubAnswer(error.code)
    except (OSError, HTTPException, ValueError) as error:
        return HubAnswer(0, str(getattr(error, "reason", error)))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: object) -> None:
        """Follow no redirect: the token must not go to another server."""

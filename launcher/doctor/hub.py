"""What a recipe starts from and trains on, and whether it can be had: here, in a bucket, or on the Hub."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from launcher.doctor.check import Finding
from trainer.architecture.hub_login import TOKEN
from trainer.architecture.lookup import HUB
from trainer.bucket import open_file
from trainer.errors import UserError
from trainer.recipe import DataSource, Recipe

TIMEOUT_S = 10.0
GET_TOKEN = (
    "make one at https://huggingface.co/settings/tokens, and `export HF_TOKEN=hf_…`, or `hf auth login`"  # noqa: S105
)
GATED = "accept its terms on the Hub, and pass your token as $HF_TOKEN; or check its name"


class HubAnswer(NamedTuple):
    """A server's status; 0 where there was none, with the reason."""

    code: int
    why: str = ""


def endpoint(environ: Mapping[str, str]) -> str:
    return (environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def token(environ: Mapping[str, str]) -> Finding:
    """Whether the Hub knows the token; a wrong one is in the way even of what is public."""
    if not environ.get(TOKEN):
        return Finding(
            name="Hub token",
            status="missing",
            said=f"${TOKEN} is not set: what is public can be had, more slowly",
            hint=GET_TOKEN,
            needed=False,
        )
    answer = _ask("GET", "/api/whoami-v2", environ)
    if answer.code == 200:
        return Finding(name="Hub token", status="ok", said=f"{endpoint(environ)} knows it")
    if answer.code in (401, 403):
        said = f"{endpoint(environ)} refuses ${TOKEN} ({answer.code})"
        return Finding(name="Hub token", status="failed", said=said, hint=GET_TOKEN)
    said = f"${TOKEN} is set; {endpoint(environ)} does not say whether it is right: {_why(answer)}"
    return Finding(name="Hub token", status="skipped", said=said, needed=False)


def model(recipe: Recipe, environ: Mapping[str, str]) -> Finding:
    """What the recipe starts from."""
    name = recipe.model_name_or_path
    if name is None:
        return _ok("model", "init: tiny, made of the recipe's own data")
    if "://" in name:
        return _in_bucket(name)
    if Path(name).is_absolute() or name.endswith(".gguf"):
        return _here("model", name)
    revision = str(recipe.model_args.get("model_revision") or "main")
    answer = HubAnswer(0)
    for file in ("config.json", "adapter_config.json"):
        answer = _ask("HEAD", f"/{name}/resolve/{urllib.parse.quote(revision, safe='')}/{file}", environ)
        if answer.code != 404:
            break
    return _on_hub("model", name, answer, environ)


def data(source: DataSource, environ: Mapping[str, str]) -> Finding:
    """One of the recipe's data sets."""
    if source.id.startswith("generated:"):
        return _ok("data", f"{source.id}, made on the node")
    if Path(source.id).is_absolute():
        return _here("data", source.id)
    if "://" in source.id:
        bucket, key = open_file(source.id)
        if bucket.size(key) is not None:
            return _ok("data", source.id)
        hint = "is it spelled like this in its bucket?"
        return Finding(name="data", status="missing", said=f"there is no {source.id}", hint=hint)
    revision = f"/revision/{urllib.parse.quote(source.revision, safe='')}" if source.revision else ""
    answer = _ask("GET", f"/api/datasets/{source.id}{revision}", environ)
    return _on_hub("data", source.id, answer, environ)


def _on_hub(what: str, name: str, answer: HubAnswer, environ: Mapping[str, str]) -> Finding:
    if 200 <= answer.code < 400:
        return _ok(what, f"{name}, on {endpoint(environ)}")
    if answer.code in (401, 403):
        said = f"{endpoint(environ)} does not let us see {name} ({answer.code})"
        return Finding(name=what, status="failed", said=said, hint=GATED)
    if answer.code == 404:
        said = f"{endpoint(environ)} has no {what} {name}"
        return Finding(name=what, status="missing", said=said, hint="check its name in the recipe")
    said = f"{name} cannot be asked for: {endpoint(environ)}: {_why(answer)}"
    return Finding(
        name=what, status="failed", said=said, hint="is the network up? $HF_ENDPOINT names a mirror"
    )


def _in_bucket(name: str) -> Finding:
    from trainer.bucket.restore import find_exported

    try:
        _bucket, manifest = find_exported(name)
    except UserError as error:
        return Finding(name="model", status="missing", said=error.message, hint=error.hint)
    return _ok("model", f"{name}, {manifest.size / 1e6:,.1f} MB")


def _here(what: str, name: str) -> Finding:
    if Path(name).expanduser().exists():
        return _ok(what, name)
    return Finding(name=what, status="missing", said=f"{name} is not there", hint="check the recipe's path")


def _ok(what: str, said: str) -> Finding:
    return Finding(name=what, status="ok", said=said)


def _why(answer: HubAnswer) -> str:
    return answer.why or f"it answers {answer.code}"


def _ask(method: str, path: str, environ: Mapping[str, str]) -> HubAnswer:
    """The status alone; a redirect to where a file lies is not followed: it is there."""
    url = endpoint(environ) + path
    if not url.startswith(("https://", "http://")):
        return HubAnswer(0, f"{url} is no address of a server")
    headers = {"Authorization": f"Bearer {environ[TOKEN]}"} if environ.get(TOKEN) else {}
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310 (looked at above)
    opener = urllib.request.build_opener(_Stays())
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return HubAnswer(int(answer.status))
    except urllib.error.HTTPError as error:
        error.close()
        return HubAnswer(error.code)
    except (OSError, HTTPException, ValueError) as error:
        return HubAnswer(0, str(getattr(error, "reason", error)))


class _Stays(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: object) -> None:
        """Stay here: the token must not go to another server."""

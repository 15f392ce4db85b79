"""A committed checkpoint as a model for others: `python -m trainer.worker.publish_model PUBLISH_JSON`.

Put together from an engine's parts, merged on request, and uploaded to the Hub. No GPU is needed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path

from trainer.errors import ModelError, UserError
from trainer.files import write_atomically
from trainer.job import Job, Outcome, Publish
from trainer.staged import IDENTITY_FILE
from trainer.worker import model_source
from trainer.worker.consolidate import ADAPTER_CONFIG, consolidate
from trainer.worker.model_source import Base

log = logging.getLogger("trainer.worker.publish_model")


def publish(task: Publish) -> None:
    """Raises `UserError` for what the user can mend."""
    work = task.into.with_name(f".{task.into.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    consolidate(task.source, work)
    if (work / ADAPTER_CONFIG).is_file():
        _name_base(work, task.job)
        if task.merge:
            _merge(task, work)
    elif task.merge:
        log.info("there is nothing to merge: every weight was trained")
    (work / "README.md").write_text(task.card)
    work.rename(task.into)
    if task.push:
        _push(task, task.push)


def _name_base(folder: Path, job: Job) -> None:
    """The one that it was trained on, by the name that others can find it under."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = job.recipe.model_name_or_path or config["base_model_name_or_path"]
    config["revision"] = job.recipe.model_args.get("model_revision")
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _merge(task: Publish, work: Path) -> None:
    from trainer.worker.merge import merge

    adapter = work.with_name(f"{work.name}-adapter")
    shutil.rmtree(adapter, ignore_errors=True)
    work.rename(adapter)
    try:
        merge(
            _base(task.job), adapter, task.job.recipe, task.job.fit, work, trained_on=_trained_on(task.source)
        )
        for path in adapter.iterdir():
            if not path.name.startswith("adapter_") and path.is_file():
                shutil.copy2(path, work / path.name) if not (work / path.name).exists() else None
    finally:
        shutil.rmtree(adapter, ignore_errors=True)


def _base(job: Job) -> Base:
    from trainer.worker import sources

    return model_source.locate(job, sources.read(job.recipe).train if job.recipe.init else [])


def _trained_on(source: Path) -> str | None:
    path = source / IDENTITY_FILE
    return str(json.loads(path.read_text())["model"]) if path.is_file() else None


def _push(task: Publish, repository: str) -> None:
    """To the Hub at $HF_ENDPOINT, with the token that huggingface_hub finds; neither is said."""
    from huggingface_hub import HfApi  # type: ignore[import-not-found,unused-ignore]
    from huggingface_hub.errors import HfHubHTTPError  # type: ignore[import-not-found,unused-ignore]

    api = HfApi()
    try:
        api.create_repo(repository, private=task.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=task.into, commit_message=f"Step {task.step} of {task.job.run_id}"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "name a token that may write to it as $HF_TOKEN" if status in (401, 403) else None
        what = f"it answers {status}" if status else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ModelError(f"{repository} cannot be pushed to the Hub: {what}", hint=hint) from None
    log.info("pushed to %s", getattr(commit, "repo_url", repository))


def main() -> None:
    path = Path(sys.argv[1])
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("trainer").setLevel(logging.INFO)
    task = Publish.model_validate_json(path.read_text())
    try:
        publish(task)
        outcome = Outcome(status="done")
    except UserError as error:
        outcome = Outcome(status="user_error", message=error.message, hint=error.hint)
    write_atomically(task.outcome, outcome.model_dump_json())


if __name__ == "__main__":
    main()

"""What lies in a bucket, brought here: a model, `s3://bucket/prefix/run/final`; data, `s3://bucket/pairs.jsonl`."""

from __future__ import annotations

from pathlib import Path

from trainer.bucket import open_file
from trainer.bucket.exported import find_exported
from trainer.bucket.restore import Tell, fetch
from trainer.bucket.store import nobody
from trainer.errors import DataError
from trainer.recipe import Recipe


def fetch_model(source: str | None, into: Path, tell: Tell = nobody) -> str | None:
    """What the worker is to load: `source` itself, or the folder that a bucket's model was fetched to; `tell` as in `fetch`.

    Raises:
        ModelError: the URI is not that of a run's exported model, or the run has none yet.
        CorruptCheckpoint: a file does not have the size or checksum of the manifest.
    """
    if source is None or "://" not in source:
        return source
    bucket, manifest = find_exported(source)
    fetch(bucket, manifest, into, tell)
    return str(into)


def fetch_data(recipe: Recipe, into: Path, tell: Tell = nobody) -> Recipe:
    """What the worker is to read: the recipe with its buckets' data files as they were fetched, each under its own name;
    `tell` as in `fetch`.

    Raises:
        DataError: there is no such file.
        BucketError, Unavailable: its bucket cannot be read.
    """
    sources = (*recipe.dataset_mixture.datasets, *recipe.dataset_mixture.test_datasets)
    there = dict.fromkeys(each.id for each in sources if "://" in each.id)
    here = {uri: into / str(number) / uri.rpartition("/")[2] for number, uri in enumerate(there)}
    for uri, path in here.items():
        bucket, key = open_file(uri)
        try:
            bucket.download(key, path, tell)
        except FileNotFoundError:
            raise DataError(f"there is no {uri}", hint="is it spelled like this in its bucket?") from None
    return recipe.with_data(lambda name: str(here.get(name, name)))

"""An adapter on the Hub as the model to begin with: its folder is fetched, to be merged like a local one.

Transformers would load it over its base and leave it there. What DPO begins with, and compares with, is the sum of
both, in which the policy's own new adapters are not yet.
"""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError

CONFIG = "adapter_config.json"
FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
"""Of an adapter and of the tokenizer beside it; not the checkpoints and logs that some lie among."""


def from_hub(name: str, revision: str, *, cache: Path | None = None) -> Path | None:
    """The folder of the adapter `name`, fetched; None if it is a whole model.

    Raises:
        ModelError: it is not there, or gated.
        Unavailable: the Hub does not answer.
    """
    from huggingface_hub import (  # type: ignore[import-not-found,unused-ignore]
        hf_hub_download,
        snapshot_download,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import (  # type: ignore[import-not-found,unused-ignore]
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    try:
        hf_hub_download(name, CONFIG, revision=revision, cache_dir=cache)
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=FILES, ignore_patterns="*/*"
        )
    except (
        LocalEntryNotFoundError
    ) as error:  # the Hub is out of reach; a whole model may be here all the same
        if isinstance(try_to_load_from_cache(name, "config.json", cache, revision), str):
            return None
        raise _explained(name, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _explained(name, error) from error
    return Path(folder)


def _explained(name: str, error: Exception) -> UserError:
    from trainer.worker.model import explained

    return explained(name, error)

"""Secrets do not belong in a recipe: it is printed, stored in the bucket and shown in reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.errors import RecipeError

_KEY = re.compile(
    r"(^|[_.])(token|auth_token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE
)
_VALUE = re.compile(
    r"\b(hf_|sk-|gh[oprsu]_|xox[abp]-|AKIA|ASIA)\w{8,}"
)  # the Hub's, OpenAI's, GitHub's, Slack's, Amazon's
NOT_SECRET = frozenset({"eos_token", "pad_token", "bos_token", "unk_token", "image_token"})


def is_secret(key: str, value: object) -> bool:
    """Whether a value looks like a secret, by its key's name or by its own form."""
    named = (
        bool(_KEY.search(key)) and key not in NOT_SECRET and value is not None and not isinstance(value, bool)
    )
    return named or (isinstance(value, str) and bool(_VALUE.search(value)))


def refuse(keys: Mapping[str, Any], source: str) -> None:
    """Raise `RecipeError` if a value, at any depth, looks like a secret; the value is not repeated."""
    for key, value in keys.items():
        if is_secret(key, value):
            raise RecipeError(
                f"{source}: `{key}` holds a secret, and recipes are stored and shown",
                hint="put it in the environment: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY …",
            )
        if isinstance(value, Mapping):
            refuse(value, source)
        elif isinstance(value, list | tuple):
            refuse({f"{key}[{number}]": item for number, item in enumerate(value)}, source)

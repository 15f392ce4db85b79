"""The model card of a run: what it was trained from, on what, where, how long, and what was lost on the way; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from trainer.accounting import attempt_cost, run_cost
from trainer.bucket.manifest import Manifest
from trainer.events import Event, of_kind
from trainer.metrics import CURVES, LOSS, REWARD_ACCURACY
from trainer.recipe import Recipe

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
POINTS = 12
"""Rows of the table of losses."""
COLUMNS = {
    **{metric.key: metric.title for metric in CURVES},
    **{metric.test_key: f"test {metric.title}" for metric in (LOSS, REWARD_ACCURACY)},
}
"""Keys and titles of the table of losses; a run shows those that it has."""


def card(
    recipe: Recipe, events: Sequence[Event], *, name: str, step: int, merged: bool, uri: str = ""
) -> str:
    """README.md for the Hub: YAML between two lines of dashes, then Markdown.

    Args:
        recipe: of the run.
        events: of all attempts, in their order.
        name: of the model.
        step: that the weights are of; later steps are left out.
        merged: whether an adapter has been added to its base.
        uri: where the run lies; empty to leave it out.
    """
    header = yaml.safe_dump(front_matter(recipe, merged=merged), sort_keys=False, allow_unicode=True)
    kind = "an adapter for" if _is_adapter(recipe, merged=merged) else "trained from"
    parts = [
        f"# {name}",
        f"{recipe.method.upper()} with the recipe `{recipe.name}`, {kind} {_base(recipe)}; step {step}."
        + (f" Run: `{uri}`." if uri else ""),
        "## Data\n\n" + _data(recipe),
        "## Hardware\n\n" + _attempts(events),
        "## Curves\n\n" + _curves(events, step),
        "## Recipe\n\n```yaml\n" + _recipe(recipe) + "```",
    ]
    return f"---\n{header}---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(recipe: Recipe, *, merged: bool) -> dict[str, Any]:
    """What the Hub reads (https://huggingface.co/docs/hub/model-cards)."""
    adapter = _is_adapter(recipe, merged=merged)
    found: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", recipe.method, "aeolus", *(["lora"] if recipe.is_lora else [])],
    }
    model = recipe.model_name_or_path
    if model and _is_hub_id(model):
        found |= {
            "base_model": model,
            "base_model_relation": "adapter" if adapter else "finetune",
            "license": "other",
            "license_name": "as-the-base-model",
            "license_link": f"https://huggingface.co/{model}",
        }
    data = [each.id for each in recipe.dataset_mixture.datasets if _is_hub_id(each.id)]
    return found | ({"datasets": list(dict.fromkeys(data))} if data else {})


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.endswith((".json", ".jsonl", ".parquet", ".gguf"))


def _is_adapter(recipe: Recipe, *, merged: bool) -> bool:
    return recipe.is_lora and not merged


def _base(recipe: Recipe) -> str:
    model = recipe.model_name_or_path
    if model is None:
        return "random weights"
    bits = f", in {recipe.quantised_bits} bits" if recipe.is_quantised else ""
    return (f"[{model}](https://huggingface.co/{model})" if _is_hub_id(model) else f"`{model}`") + bits


def _data(recipe: Recipe) -> str:
    mixture = recipe.dataset_mixture
    lines = [
        f"- `{each.id}`, split `{each.split}`"
        + (f", {each.weight:.0%} of its rows" if each.weight < 1 else "")
        + (f", revision `{each.revision}`" if each.revision else "")
        + use
        for use, sources in (("", mixture.datasets), (", to evaluate on", mixture.test_datasets))
        for each in sources
    ]
    return "\n".join(lines)


def _attempts(events: Sequence[Event]) -> str:
    """A row for each attempt: machine, steps, hours, and how it ended."""
    attempts: dict[int, list[Event]] = {}
    for event in events:
        attempts.setdefault(event["attempt"], []).append(event)
    rows = [
        f"| {number} | {_shape(own)} | {_span(own)} | {attempt_cost(own).hours:.2f} | {_end(own)} |"
        for number, own in attempts.items()
    ]
    lost = sum("lost" in row or "preempted" in row for row in rows)
    hours = run_cost(attempts.values()).hours
    table = "| attempt | machine | steps | hours | end |\n|--:|---|---|--:|---|\n" + "\n".join(rows)
    return f"{hours:.2f} hours in {_count(len(rows), 'attempt')}, {_count(lost, 'recovery', 'recoveries')}.\n\n{table}"


def _shape(events: Sequence[Event]) -> str:
    claimed = next(iter(of_kind(events, "claimed")), {})
    shape, fit = claimed.get("shape") or {}, claimed.get("fit") or {}
    gpus = (
        f"{shape['count']} x {shape['accelerator']}"
        if shape.get("accelerator")
        else f"CPU, {shape.get('cores', '?')} cores"
    )
    nodes = f"{shape['nodes']} nodes of " if shape.get("nodes", 1) > 1 else ""
    return f"{nodes}{gpus}" + (f", {fit['engine']}" if fit.get("engine") not in (None, "single") else "")


def _span(events: Sequence[Event]) -> str:
    start = max((event["step"] for event in of_kind(events, "restored")), default=0)
    last = max((event["step"] for event in of_kind(events, "step")), default=start)
    return f"{start} to {last}" if last > start else "none"


def _end(events: Sequence[Event]) -> str:
    ends = of_kind(events, "preempted", "failed", "superseded", "done", "exported")
    if not ends:
        return "lost"
    return "done" if ends[-1]["kind"] == "exported" else str(ends[-1]["kind"])


def _curves(events: Sequence[Event], step: int) -> str:
    """Some of the steps; of those that were taken twice the later telling, which is the same."""
    told: dict[int, dict[str, Any]] = {}
    for event in of_kind(events, "step", "eval"):
        if event["step"] <= step:
            told.setdefault(event["step"], {}).update(event)
    names = [name for name in COLUMNS if any(isinstance(one.get(name), int | float) for one in told.values())]
    steps = _spread(sorted(told), [at for at in sorted(told) if LOSS.test_key in told[at]])
    if not names or not steps:
        return "None are known."
    lines = [
        "| step | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|--:" * (len(names) + 1) + "|",
    ]
    lines += [f"| {at} | " + " | ".join(_number(told[at].get(name)) for name in names) + " |" for at in steps]
    return "\n".join(lines)


def _spread(steps: list[int], evaluated: list[int]) -> list[int]:
    """First, last, and some between, of evaluated ones if there are."""
    wanted = sorted({*steps[:1], *evaluated, *steps[-1:]}) if evaluated else steps
    if len(wanted) <= POINTS:
        return wanted
    return [wanted[round(at * (len(wanted) - 1) / (POINTS - 1))] for at in range(POINTS)]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _recipe(recipe: Recipe) -> str:
    keys = {key: value for key, value in recipe.as_flat().items() if key != "name"}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)


def _count(number: int, thing: str, things: str = "") -> str:
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def merged_of(recipe: Recipe, manifest: Manifest) -> bool:
    """Whether a committed model is whole, though an adapter was trained."""
    return recipe.is_lora and not any(file.path == "adapter_config.json" for file in manifest.files)

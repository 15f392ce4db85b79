"""Builds the model card of a run: base model, data, hardware, hours, recoveries, curves and recipe. Pure functions."""

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
"""The most rows that the table of losses has."""
COLUMNS = {
    **{metric.key: metric.title for metric in CURVES},
    **{metric.test_key: f"test {metric.title}" for metric in (LOSS, REWARD_ACCURACY)},
}
"""Keys and titles of the table of losses. A card shows those that the run has."""


def card(
    recipe: Recipe, events: Sequence[Event], *, name: str, step: int, merged: bool, uri: str = ""
) -> str:
    """Return the text of README.md for the Hub: YAML between two lines of dashes, then Markdown.

    Args:
        recipe: the recipe of the run.
        events: the events of all attempts, in order.
        name: name of the model.
        step: step of the weights. Later steps are left out.
        merged: whether an adapter has been merged into its base model.
        uri: address of the run. Empty: the card does not name it.
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
    """Return the metadata that the Hub reads (https://huggingface.co/docs/hub/model-cards)."""
    adapter = _is_adapter(recipe, merged=merged)
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", recipe.method, "aeolus", *(["lora"] if recipe.is_lora else [])],
    }
    model = recipe.model_name_or_path
    if model and _is_hub_id(model):
        header |= {
            "base_model": model,
            "base_model_relation": "adapter" if adapter else "finetune",
            "license": "other",
            "license_name": "as-the-base-model",
            "license_link": f"https://huggingface.co/{model}",
        }
    data = [source.id for source in recipe.dataset_mixture.datasets if _is_hub_id(source.id)]
    return header | ({"datasets": list(dict.fromkeys(data))} if data else {})


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
        f"- `{source.id}`, split `{source.split}`"
        + (f", {source.weight:.0%} of its rows" if source.weight < 1 else "")
        + (f", revision `{source.revision}`" if source.revision else "")
        + use
        for use, sources in (("", mixture.datasets), (", for evaluation", mixture.test_datasets))
        for source in sources
    ]
    return "\n".join(lines)


def _attempts(events: Sequence[Event]) -> str:
    """Return a table with the machine, steps, hours and end of each attempt."""
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
    """Return a table of the metrics at some of the steps.

    A step that was repeated after a recovery appears once. Both times have the same values.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for event in of_kind(events, "step", "eval"):
        if event["step"] <= step:
            by_step.setdefault(event["step"], {}).update(event)
    names = [
        name
        for name in COLUMNS
        if any(isinstance(metrics.get(name), int | float) for metrics in by_step.values())
    ]
    steps = _spread(sorted(by_step), [at for at in sorted(by_step) if LOSS.test_key in by_step[at]])
    if not names or not steps:
        return "No metrics were recorded."
    lines = [
        "| step | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|--:" * (len(names) + 1) + "|",
    ]
    lines += [
        f"| {at} | " + " | ".join(_number(by_step[at].get(name)) for name in names) + " |" for at in steps
    ]
    return "\n".join(lines)


def _spread(steps: list[int], evaluated: list[int]) -> list[int]:
    """Choose at most `POINTS` steps, evenly spread, with the first and the last. Prefer evaluated steps."""
    candidates = sorted({*steps[:1], *evaluated, *steps[-1:]}) if evaluated else steps
    if len(candidates) <= POINTS:
        return candidates
    return [candidates[round(at * (len(candidates) - 1) / (POINTS - 1))] for at in range(POINTS)]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _recipe(recipe: Recipe) -> str:
    keys = {key: value for key, value in recipe.as_flat().items() if key != "name"}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)


def _count(number: int, thing: str, things: str = "") -> str:
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def is_merged(recipe: Recipe, manifest: Manifest) -> bool:
    """Return whether a commit has a complete model although an adapter was trained."""
    return recipe.is_lora and not any(file.path == "adapter_config.json" for file in manifest.files)

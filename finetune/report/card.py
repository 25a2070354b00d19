"""The model card of a fine-tuned task: README.md, generated from fovea.json only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.core.text import markdown

_MANY = 40


def card(record: Mapping[str, Any]) -> str:
    """Markdown: the task, its use, its numbers and their protocol, training data and initial weights."""
    task, model, metrics = record["task"]["name"], record["model"], record.get("metrics", {})
    height, width = model["img_size"]
    classes = list(record["classes"])
    named = ", ".join(markdown(name) for name in classes[:_MANY]) + (
        f", ... ({len(classes)} in all)" if len(classes) > _MANY else ""
    )
    source = record.get("source", {})
    data = record.get("data", {})
    sections = [
        f"# {task.capitalize()}, fine-tuned",
        f"From: {markdown(source.get('title', 'not recorded'))}. Built for images of {height} x {width} px.",
        "## Use",
        f"```\nfovea predict THIS_FOLDER IMAGES... --out DIR\n```{_timm(record)}",
        "## Numbers",
        _numbers(metrics),
        "## Data",
        "\n".join(f"- {key}: {row['num_samples']} images, {markdown(row['images'])}" for key, row in data.items())
        or "Not recorded.",
        "## Classes",
        named or "None.",
        "## Made by",
        "\n".join(f"- {markdown(name)} {markdown(value)}" for name, value in (record.get("versions") or {}).items())
        or "Not recorded.",
        "The resolved configuration is `recipe` in `fovea.json`.",
        "## Licence",
        "Not stated: the publisher of these weights chooses it, in accordance with the licence of the training images.",
    ]
    return "\n\n".join(sections) + "\n"


def _timm(record: Mapping[str, Any]) -> str:
    if not record.get("timm"):
        return ""
    return '\n\n```python\nimport timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)\n```'


def _numbers(metrics: Mapping[str, Any]) -> str:
    values = metrics.get("values") or {}
    if not values:
        return "None were measured."
    rows = "\n".join(
        f"| {markdown(name)} | {'none' if value is None else f'{value:.4f}'} |" for name, value in values.items()
    )
    return (
        f"| | |\n|---|---|\n{rows}\n\nMeasured: {markdown(metrics.get('protocol'))}, after step {metrics.get('step')}."
    )

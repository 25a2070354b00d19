"""The model card of a release: README.md, made from what fovea.json records and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"mae": "masked autoencoder (He et al. 2021)", "dino": "DINO (Caron et al. 2021)"}


def card(record: Mapping[str, Any]) -> str:
    """Markdown: what it is, how to load it, what it was trained on, its numbers, how it was made."""
    model, objective = record["model"], record["objective"]
    height, width = model["img_size"]
    title = f"Vision transformer, {NAMES.get(objective, objective)}"
    sections = [
        f"# {title}",
        f"A backbone pretrained without labels: width {model['embed_dim']}, depth {model['depth']}, "
        f"{model['num_heads']} heads, patches of {model['patch_size']} px, images of {height} x {width} px, "
        f"{model['in_chans']} channels, {model.get('num_registers', 0)} registers.",
        "## Load",
        '```python\nimport timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)\n'
        "features = model.forward_features(images)  # class token, registers, patches\n```",
        f"Images are scaled to [0, 1], then normalized with mean {_numbers(record['mean'])} and standard deviation "
        f"{_numbers(record['std'])}.",
        "`heads.safetensors` holds the rest of the objective, for continued pretraining.",
        "## Data",
        _facts(record.get("data"), none="Not recorded."),
        "## Numbers",
        _facts(record.get("metrics"), none="None were measured. Loss values are in the run's log, not here."),
        "## Made by",
        _facts({"commit": record.get("commit"), **(record.get("versions") or {})}, none="Not recorded."),
        "The resolved configuration is `recipe` in `fovea.json`.",
        "## Licence",
        "Not stated: whoever publishes these weights chooses it, with the licence of the training images in mind.",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(values: Mapping[str, Any] | None, *, none: str) -> str:
    if not values:
        return none
    rows = [f"| {name} | {_text(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)

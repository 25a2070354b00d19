"""The model card of a release: README.md, generated from fovea.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.core.text import markdown
from pretrain.models.layers.ffn import TOPK

TITLES = {"vit": "Vision transformer", "timm": "Backbone of timm's", "conv_encoder": "Convolutional encoder"}
NAMES = {"mae": "masked autoencoder (He et al. 2021)", "dino": "DINO (Caron et al. 2021)"}


def card(record: Mapping[str, Any]) -> str:
    """Markdown: architecture, loading, data, measured numbers, versions."""
    model, objective = record["model"], record["objective"]
    kind = model.get("class", "vit")
    sections = [
        f"# {TITLES[kind]}, {NAMES.get(objective, markdown(objective))}",
        f"A backbone pretrained without labels: {_widths(kind, model)}.",
        "## Load",
        *_loading(record.get("timm", "vit")),
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


def _widths(kind: str, model: Mapping[str, Any]) -> str:
    height, width = model["img_size"]
    images = f"images of {height} x {width} px, {model['in_chans']} channels"
    if kind == "timm":
        return f"timm's {markdown(model['name'])}, {images}"
    if kind == "conv_encoder":
        return f"{model['embed_dim']} channels, one token of {model['patch_size']} px and side, {images}"
    parts = [
        f"width {model['embed_dim']}, depth {model['depth']}, {model['num_heads']} heads",
        f"patches of {model['patch_size']} px, {images}, {model.get('num_registers', 0)} registers",
        f"positions: {markdown(model.get('pos_embed', 'sincos'))}",
    ]
    more = {
        "no class token": not model.get("class_token", True),
        f"relative-position bias {model.get('rel_pos_bias')}": model.get("rel_pos_bias", "none") != "none",
        "layer scale": model.get("layer_scale") is not None,
        "SwiGLU": model.get("ffn", "mlp") == "swiglu",
        "squared ReLU in the MLPs": model.get("ffn") == "relu2",
        f"{model.get('ffn_topk', TOPK):.3g} of the units of each MLP": model.get("ffn") == "topk",
    }
    return ", ".join([*parts, *(text for text, holds in more.items() if holds)])


def _loading(opened: str) -> list[str]:
    """`opened`: timm's layer names (`TimmModel.kind`), or why timm has no such class."""
    if opened in ("vit", "beit", "eva", "timm"):
        return [
            '```python\nimport timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)\n'
            "features = model.forward_features(images)  # of a transformer: class token, registers, patches\n```"
        ]
    return [
        f"timm cannot open this folder: {markdown(opened)}. Fovea rebuilds it from `fovea.json`:",
        "```python\nfrom pretrain.models.release.folder import read_release\n\n"
        'model = read_release("THIS_FOLDER").build()\ntokens = model(images)\n```',
    ]


def _facts(values: Mapping[str, Any] | None, *, none: str) -> str:
    if not values:
        return none
    rows = [f"| {markdown(name)} | {_text(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return markdown(value)


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)

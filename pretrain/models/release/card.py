"""The model card of a release: README.md, generated from fovea.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.core.text import markdown
from pretrain.models.layers.ffn import TOPK
from pretrain.models.release.manifest import FEATURES_ONNX, FEATURES_PT2

TITLES = {"vit": "Vision transformer", "video_vit": "Vision transformer of clips"}
TITLES |= {"timm": "Backbone of timm's", "conv_encoder": "Convolutional encoder"}
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
        *_graphs(record.get("graphs"), model["in_chans"]),
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
    if kind == "video_vit":
        images = f"clips of {model['num_frames']} frames, {model['tubelet_size']} to a token, {images}"
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
        "root mean square norms": model.get("norm_layer") == "rms",
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


def _graphs(graphs: Mapping[str, Any] | None, in_chans: int) -> list[str]:
    """How others open the graphs of a release that timm cannot open, and why one is lacking."""
    if graphs is None:
        return []
    files, sections = graphs["files"], list[str]()
    if files:
        names = " and ".join(f"`{name}`" for name in files)
        outputs = "; ".join(f'"{name}" {markdown(content)}' for name, content in graphs["outputs"].items())
        largest = max(row["largest_difference"] for rows in files.values() for row in rows)
        sections.append(
            f"Without Fovea: {names} take float32 pixels [batch, {in_chans}, height, width] in 0 to 1, which they "
            f"normalize themselves; height and width {markdown(graphs['sides'])}. They give {outputs}. They were "
            f"compared with the backbone before they were kept: largest difference {largest:.1e}."
        )
    if FEATURES_PT2 in files:
        sections.append(
            f'```python\nimport torch\n\nmodel = torch.export.load("{FEATURES_PT2}").module()\n'
            "found = model(pixels)\n```"
        )
    if FEATURES_ONNX in files:
        sections.append(
            f'```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("{FEATURES_ONNX}")\n'
            'found = session.run(None, {"images": pixels})  # of numpy\n```'
        )
    if FEATURES_PT2 in files:
        sections.append(
            f"`{FEATURES_PT2}` is a program in an archive of PyTorch's: open it only if you trust who wrote it. Fovea "
            "does not open it."
        )
    sections += [f"There is no `{name}`: {markdown(reason)}." for name, reason in graphs["lacking"].items()]
    return sections


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

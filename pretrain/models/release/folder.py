"""A release: a backbone in a folder that timm, fine-tuning and continued pretraining open.

model.safetensors, config.json    what `timm.create_model("local-dir:FOLDER", pretrained=True)` opens; equal features.
                                  Without config.json timm has no such class; the model card gives the reason.
features.pt2, features.onnx       where there is no config.json: graphs for everybody else (`release.graphs`)
heads.safetensors                 the rest of the objective, for continued pretraining
fovea.json                        objective, model, recipe, data, metrics, versions
MANIFEST.json                     size and sha256 of these files, compared at every opening
README.md                         the model card, generated from fovea.json; not in the manifest, so it may be edited

`release_model()` of a backbone describes how it is rebuilt: {"class": a name in BACKBONES, **arguments of that class}.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.core.files import replacing_folder
from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.core.manifest import MANIFEST
from pretrain.core.tensorfile import write_tensors
from pretrain.models.backbones import families
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.importers import Weights
from pretrain.models.importers.files import read_safetensors
from pretrain.models.importers.weights import not_finite
from pretrain.models.release.card import card
from pretrain.models.release.graphs import write_graphs
from pretrain.models.release.manifest import (
    HEADS,
    RECORD,
    TIMM,
    WEIGHTS,
    NotFiniteError,
    check_release,
    write_manifest,
)
from pretrain.models.release.timm_form import TimmModel, from_timm, timm_model, to_timm
from pretrain.models.release.timm_form import config as timm_config

FORMAT = 1
# the "class" of a release_model -> (its module in pretrain.models, its class)
BACKBONES = {
    "vit": ("backbones.vit", "ViT"),
    "video_vit": ("backbones.video", "VideoViT"),
    "timm": ("backbones.timm_backbone", "TimmBackbone"),
    "conv_encoder": ("tokenizers.dvae", "ConvEncoder"),
}


@dataclass(frozen=True, kw_only=True)
class Release(Weights):
    """An opened release: `model` is the backbone's `release_model`, `record` the content of fovea.json."""

    model: dict[str, Any]
    record: dict[str, Any]

    def build(self) -> ImageEncoder:
        """The backbone with its weights."""
        backbone = self.untrained()
        backbone.load_state_dict(self.backbone)
        return backbone

    def untrained(self) -> ImageEncoder:
        """The backbone with initial weights, drawn from torch's generator."""
        return backbone_of(self.model)


def backbone_of(model: Mapping[str, Any]) -> ImageEncoder:
    """The backbone that a `release_model` describes, with initial weights drawn from torch's generator.

    Raises:
        ValueError: this version has no such backbone, or it cannot be built so.
    """
    arguments = {name: value for name, value in model.items() if name != "class"}
    return _backbone_class(model)(**{**arguments, "img_size": tuple(arguments["img_size"])})


def write_release(
    folder: Path | str,
    backbone: ImageEncoder,
    *,
    objective: str,
    extra_state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    graphs: bool = True,
) -> Path:
    """Write the release completely or not at all; an existing release is replaced.

    Args:
        extra_state: `Objective.heads_state`.
        record: recipe (the resolved configuration), data (fingerprint, number of images), metrics (number by the name
            of its protocol), commit, versions.
        mean, std: per channel, of the normalization that the backbone was trained with.
        graphs: write those of `release.graphs` where timm has no such class.

    Raises:
        ValueError: the folder holds something else, or mean and std are not of the backbone's channels.
        NotFiniteError: a weight is NaN or infinite; nothing was written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise ValueError(f"{folder}: holds other files than a release; choose another folder")
    if not len(mean) == len(std) == backbone.in_chans:
        raise ValueError(
            f"mean and std have {len(mean)} and {len(std)} values, the backbone {backbone.in_chans} channels"
        )
    model = backbone.release_model()
    _backbone_class(model)
    other = timm_model(backbone)
    facts = {"format": FORMAT, "manifest": MANIFEST, "objective": objective, "heads": HEADS, "model": model, **record}
    facts |= {"mean": list(mean), "std": list(std), "timm": other if isinstance(other, str) else other.kind}

    state = backbone.state_dict()
    check_finite(folder, state, extra_state)
    with replacing_folder(folder) as temporary:
        if isinstance(other, TimmModel):
            state = to_timm(state, other.kind)
            description = timm_config(other, backbone, mean=mean, std=std)
            (temporary / TIMM).write_text(json.dumps(description, indent=2) + "\n")
        elif graphs and "clip" not in backbone.provides:
            facts["graphs"] = write_graphs(temporary, backbone, mean=mean, std=std)
        write_tensors(temporary / WEIGHTS, state, {"format": "pt"})
        write_tensors(temporary / HEADS, extra_state, {"format": "pt"})
        (temporary / RECORD).write_text(json.dumps(facts, indent=2) + "\n")
        (temporary / "README.md").write_text(card(facts), encoding="utf-8")
        write_manifest(temporary, [path.name for path in temporary.iterdir() if path.name != "README.md"])
    return folder


def read_release(folder: Path | str) -> Release:
    """Open a release; the weights are in our names and layout.

    Raises:
        ValueError: the folder is no release, is incomplete, damaged (a file differs from the manifest) or of a newer
            format, or a weight is NaN or infinite.
    """
    folder = Path(folder)
    check_release(folder)
    lacking = [name for name in (RECORD, WEIGHTS, HEADS) if not (folder / name).is_file()]
    if lacking:
        raise ValueError(f"{folder}: not a release, it has no {', '.join(lacking)}; `fovea release RUN OUT` writes one")
    record = _read_record(folder / RECORD)
    model = {"class": "vit", **record["model"], "img_size": tuple(record["model"]["img_size"])}
    patch = families.timm_stride(model["name"], model) if model["class"] == "timm" else model.get("patch_size")
    grid = None if patch is None else (model["img_size"][0] // patch, model["img_size"][1] // patch)
    backbone, heads = read_safetensors(folder / WEIGHTS), read_safetensors(folder / HEADS)
    check_finite(folder, backbone, heads)
    if (folder / TIMM).is_file():
        backbone = from_timm(backbone, record.get("timm", "vit"), model)
    rule = model.get("pos_resize", "exact")
    return Release(record["objective"], backbone, heads, grid=grid, pos_resize=rule, model=model, record=record)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); copy the release again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(f"{path.parent}: release format {found}; this version reads {FORMAT}")
    lacking = [key for key in ("objective", "model", "mean", "std") if key not in record]
    if lacking or "img_size" not in record["model"]:
        raise ValueError(f"{path}: has no {', '.join(lacking) or 'model.img_size'}; copy the release again")
    return record


def _backbone_class(model: Mapping[str, Any]) -> type[ImageEncoder]:
    """The class that a `release_model` names.

    Raises:
        ValueError: this version has no such backbone.
    """
    if model.get("class") not in BACKBONES:
        raise ValueError(f"a release of backbone {model.get('class')!r}; this version has {', '.join(BACKBONES)}")
    module, name = BACKBONES[model["class"]]
    return getattr(importlib.import_module(f"pretrain.models.{module}"), name)


def check_finite(folder: Path, *states: Mapping[str, Tensor]) -> None:
    """Refuse weights that no prediction can come from.

    Raises:
        NotFiniteError: names the first tensor with NaN or an infinite value.
    """
    for state in states:
        if broken := not_finite(state):
            raise NotFiniteError(f"{folder}: not a usable release: {broken}; release an earlier checkpoint")

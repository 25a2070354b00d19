"""A release: the folder that carries a backbone out of a run, to timm and to fine-tuning.

model.safetensors, config.json    what `timm.create_model("local-dir:FOLDER", pretrained=True)` opens; equal features
heads.safetensors                 the rest of the objective, for continued pretraining
fovea.json                        objective, model, recipe, data, metrics, versions
README.md                         the model card, made from fovea.json
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.models.importers import State, Weights
from pretrain.models.release_card import card
from pretrain.models.sizes import SIZES
from pretrain.models.vit import ViT

FORMAT = 1
WEIGHTS, HEADS, RECORD, TIMM = "model.safetensors", "heads.safetensors", "fovea.json", "config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Release(Weights):
    """An opened release: `model` are the arguments of `ViT`, `record` is all of fovea.json."""

    model: dict[str, Any] | None = None
    record: dict[str, Any] | None = None

    def build(self) -> ViT:
        """The backbone with its weights."""
        vit = self.untrained()
        vit.load_state_dict(self.backbone)
        return vit

    def untrained(self) -> ViT:
        """The backbone as a run starts it, drawn from torch's random numbers."""
        assert self.model is not None
        return ViT(**self.model)


def write_release(
    folder: Path | str,
    backbone: ViT,
    *,
    model_config: Mapping[str, Any],
    objective: str,
    extra_state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Path:
    """Write the release complete or not at all; a release that is already there is replaced.

    Args:
        model_config: the arguments of `ViT` that the backbone was built with.
        extra_state: what `Objective.heads_state` gave.
        record: recipe (the resolved configuration), data (fingerprint, number of images), metrics (number by the name
            of its protocol), commit, versions.
        mean, std: per channel, of the normalization that the backbone was trained with.

    Raises:
        ValueError: the folder holds something else, or mean and std are not of the backbone's channels.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise ValueError(f"{folder}: holds files that are no release; choose another folder")
    if not len(mean) == len(std) == backbone.in_chans:
        raise ValueError(
            f"mean and std have {len(mean)} and {len(std)} values, the backbone {backbone.in_chans} channels"
        )
    model = {**model_config, "img_size": list(backbone.img_size)}
    model |= {"pos_embed": backbone.pos_kind, "pos_resize": backbone.pos_resize, "drop_path_rate": 0.0}
    facts = {"format": FORMAT, "objective": objective, "heads": HEADS, "model": model, **record}
    facts |= {"mean": list(mean), "std": list(std)}

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(_plain(fold(backbone.state_dict())), temporary / WEIGHTS, metadata={"format": "pt"})
    save_file(_plain(extra_state), temporary / HEADS, metadata={"format": "pt"})
    (temporary / TIMM).write_text(json.dumps(timm_config(backbone, mean=mean, std=std), indent=2) + "\n")
    (temporary / RECORD).write_text(json.dumps(facts, indent=2) + "\n")
    (temporary / "README.md").write_text(card(facts))
    _flush(temporary)
    _replace(folder, temporary)
    return folder


def read_release(folder: Path | str) -> Release:
    """Open a release; the weights are in our names and layout.

    Raises:
        ValueError: the folder is no release, is incomplete, or is of a newer format.
    """
    folder = Path(folder)
    lacking = [name for name in (RECORD, WEIGHTS, HEADS) if not (folder / name).is_file()]
    if lacking:
        raise ValueError(f"{folder}: not a release, it has no {', '.join(lacking)}; `fovea release RUN OUT` writes one")
    record = json.loads((folder / RECORD).read_text())
    if record.get("format") != FORMAT:
        raise ValueError(f"{folder}: release format {record.get('format')}; this version reads {FORMAT}")
    model = record["model"] | {"img_size": tuple(record["model"]["img_size"])}
    grid = (model["img_size"][0] // model["patch_size"], model["img_size"][1] // model["patch_size"])
    backbone = unfold(load_file(folder / WEIGHTS))
    return Release(
        record["objective"], backbone, load_file(folder / HEADS), grid=grid, model=model, record=record
    )  # fmt: skip


def fold(state: Mapping[str, Tensor]) -> State:
    """Our ViT state in timm's layout.

    With registers timm has no layout of a class row alone (`no_embed_class` leaves out both): the class row is added to
    the class token, which gives the same first layer.
    """
    state = dict(state)
    if "reg_token" in state:
        table = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
    return state


def unfold(state: Mapping[str, Tensor]) -> State:
    """The inverse of `fold`, up to how much of the class token its position row holds: here nothing."""
    state = dict(state)
    if "reg_token" in state:
        table = state["pos_embed"]
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    return state


def timm_config(backbone: ViT, *, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """config.json as timm reads it. A null `first_conv` keeps timm from fitting the first layer to other channels."""
    size = list(backbone.img_size)
    arguments = {
        "img_size": size,
        "patch_size": backbone.patch_size,
        "in_chans": backbone.in_chans,
        "embed_dim": backbone.embed_dim,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": backbone.mlp_ratio,
        "qkv_bias": backbone.qkv_bias,
        "reg_tokens": backbone.num_registers,
        "no_embed_class": backbone.num_registers > 0,
        "global_pool": "token",
        "num_classes": 0,
    }
    pretrained = {
        "input_size": [backbone.in_chans, *size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj" if backbone.in_chans == 3 else None,
        "classifier": "head",
    }
    return {
        "architecture": architecture(backbone),
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def architecture(backbone: ViT) -> str:
    """The entry of timm's registry to start from; `model_args` then sets every width."""
    patch = {"vit_huge": 14, "vit_giant": 14}
    for name, size in SIZES.items():
        if (size["embed_dim"], size["depth"]) == (backbone.embed_dim, backbone.depth):
            return f"{name}_patch{patch.get(name, 16)}_224"
    return "vit_base_patch16_224"


def _plain(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _replace(folder: Path, new: Path) -> None:
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

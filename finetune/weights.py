"""The backbone of a run with weights of any source; its positions are resampled to the run's image size.

All sources of pretraining are supported: a release, a checkpoint of an official code, a timm model with local weights,
a folder of Hugging Face. Nothing is downloaded, and no code in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.config import ModelSource
from finetune.heads.pooled.lora import merged_state
from finetune.release import is_task, open_task
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.configlib import ConfigError
from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD, Orientation, ValueRange
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.importers import Weights, load_official, load_strict
from pretrain.models.importers.channels import to_channels
from pretrain.models.importers.facts import DEFAULT_SIDE, facts_of, recipe
from pretrain.models.importers.files import read_state
from pretrain.models.importers.huggingface.config import read_config
from pretrain.models.importers.huggingface.names import huggingface
from pretrain.models.importers.libraries import resnet_depth
from pretrain.models.importers.prefixes import part_below, search, the_only
from pretrain.models.importers.weights import Source, State, under
from pretrain.models.release.folder import backbone_of, read_release

__all__ = ["OpenedBackbone", "open_source"]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")


@dataclass(frozen=True)
class _SourceContents:
    """The content of a source: a recipe of the backbone (`release_model`), its weights, and facts about them."""

    model: dict[str, Any]
    weights: Weights | None
    title: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    lines: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    orientation: Orientation = "exif"
    value_range: ValueRange | None = None


def open_source(model: ModelSource, *, in_chans: int | None = None, seed: int = 0) -> OpenedBackbone:
    """The backbone of a configuration with its weights.

    Parameters that the weights lack, and all with `random`, are drawn from `seed`. Fixed position tables become trained
    ones, as in the fine-tuning of the official codes.

    Args:
        in_chans: of the images; None: those of the backbone.

    Raises:
        ConfigError: the source is missing, damaged, or of another architecture; names that do not fit are listed.
    """
    kind, value = model.source
    try:
        return _open(model, kind, value, in_chans=in_chans, seed=seed)
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"model.{kind}={value}", str(error).splitlines()) from error


def _open(model: ModelSource, kind: str, value: str, *, in_chans: int | None, seed: int) -> OpenedBackbone:
    found = _READERS[kind](model)
    described = {**found.model, **model.args}
    if model.size is not None:
        described["img_size"] = model.size
    if model.in_chans is not None:
        described["in_chans"] = model.in_chans
    torch.manual_seed(seed)
    backbone = backbone_of(described)
    if not isinstance(backbone, Backbone):
        raise ValueError(f"a {type(backbone).__name__} cannot be fine-tuned; choose a release of another objective")
    if "clip" in backbone.provides:
        raise ValueError("it reads clips, which pretraining and `fovea probe` do; choose a release of an image model")
    if in_chans is not None and backbone.in_chans != in_chans:
        raise ValueError(f"its backbone takes {backbone.in_chans} channels; set model.in_chans={backbone.in_chans}")
    mean, std = model.mean or tuple(found.mean), model.std or tuple(found.std)
    if not len(mean) == len(std) == backbone.in_chans:
        raise ValueError(f"it was trained with the mean and std of {len(found.mean)} channels; give model.mean and "
                         f"model.std of {backbone.in_chans}, which `fovea data stats` measures")  # fmt: skip
    if model.drop_path_rate:
        backbone.set_drop_path(model.drop_path_rate)
    backbone.train_positions()
    lines = found.lines
    if model.random or found.weights is None:
        lines += ("random weights: nothing was loaded (model.random)",)
    else:
        weights, state = found.weights, found.weights.backbone
        if model.in_chans is not None and model.in_chans != found.model.get("in_chans", 3):
            state, line = to_channels(state, backbone.state_dict(), model.channels_from)
            lines += (line,)
        report = load_strict(
            backbone,
            state,
            grid=weights.grid,
            left_out=weights.left_out,
            converted=weights.converted,
            pos_resize=weights.pos_resize,
            facts=weights.facts,
        )
        lines += tuple(str(report).splitlines())
    if model.activation_checkpointing:
        backbone.set_checkpointing(True)
    return OpenedBackbone(
        backbone,
        mean,
        std,
        found.title + (", random weights" if model.random else ""),
        lines,
        {"kind": kind, "path": value, "random": model.random, **found.record},
        found.orientation,
        found.value_range,
    )


def _of_release(model: ModelSource) -> _SourceContents:
    assert model.release is not None
    if is_task(model.release):
        return _of_task(model.release)
    release = read_release(model.release)
    kept = ("objective", "data", "metrics", "commit")
    heads = tuple(f"{name} ({release.kind})" for name in release.heads)
    return _SourceContents(
        release.model,
        replace(release, left_out=heads),
        f"{release.kind} release {model.release}",
        mean=tuple(release.record["mean"]),
        std=tuple(release.record["std"]),
        record={key: release.record[key] for key in kept if key in release.record},
        orientation=recorded_orientation(release.record),
        value_range=recorded_range(release.record),
    )


def _of_task(path: str) -> _SourceContents:
    """The backbone of a fine-tuned task, with low-rank updates merged, without a detector's relative positions."""
    task, record = open_task(path)
    backbone = task.bare_backbone
    with torch.device("meta"):
        own = backbone_of(record["model"]).state_dict().keys()
    state = merged_state(backbone)
    left_out = tuple(name for name in state if name not in own and name.endswith(("rel_pos_h", "rel_pos_w")))
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    norm = getattr(getattr(task, "head", None), "fc_norm", None)
    if norm is not None:  # the backbone's last norm moved to the classifier of the mean patch
        kept |= {f"{backbone.blocks_prefix}norm.{name}": tensor for name, tensor in norm.state_dict().items()}
    weights = Weights("task", kept, {}, grid=backbone.grid_size, left_out=left_out)
    kept = {key: record[key] for key in ("task", "data", "metrics", "commit") if key in record}
    return _SourceContents(
        record["model"],
        weights,
        f"{record['task']['name']} release {path}",
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        record=kept,
        orientation=recorded_orientation(record),
        value_range=recorded_range(record),
    )


def _of_official(model: ModelSource) -> _SourceContents:
    assert model.official is not None
    path = Path(model.official)
    weights = load_official(path, prefix=model.prefix, grid=model.grid)
    described, lines = _described(model, weights)
    lines += ("mean and std: ImageNet's; give model.mean and model.std if others were used (BEiT: 0.5)",)
    record = {"objective": weights.kind, "sha256": _sha256(path)}
    return _SourceContents(described, weights, f"{weights.kind} checkpoint {path.name}", lines=lines, record=record)


def _of_huggingface(model: ModelSource) -> _SourceContents:
    assert model.huggingface is not None
    folder = Path(model.huggingface)
    config = read_config(folder)
    if config is None:
        raise ValueError(f"{folder}: contains no config.json; expected a folder of Hugging Face")
    if "architecture" in config:
        name = config["architecture"]
        raise ValueError(f"{folder}: a model of timm; use model.timm={name} model.weights={folder}")
    weights = huggingface(_read_folder(folder), Source(folder, model.grid, folder))
    if weights is None:
        raise ValueError(f"{folder}: no vision transformer of Hugging Face ({config.get('model_type')})")
    described, lines = _described(model, weights)
    found = _SourceContents(described, weights, f"{config.get('model_type')} of {folder.name}", lines=lines)
    preprocessor = folder / "preprocessor_config.json"
    values = json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor.is_file() else {}
    if "image_mean" in values and "image_std" in values:
        found = replace(found, mean=tuple(values["image_mean"]), std=tuple(values["image_std"]))
    return found


def _of_timm(model: ModelSource) -> _SourceContents:
    assert model.timm is not None
    size = model.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    described = {"class": "timm", "name": model.timm, "img_size": size, "in_chans": 3}
    with torch.device("meta"):
        built = TimmBackbone(model.timm, size, **model.args)
    defaults = built.model.pretrained_cfg
    mean, std = tuple(defaults.get("mean", IMAGENET_MEAN)), tuple(defaults.get("std", IMAGENET_STD))
    if model.weights is None:
        return _SourceContents(described, None, f"timm/{model.timm}", mean, std)
    path = Path(model.weights)
    state = _read_folder(path) if path.is_dir() else read_state(path)
    classifier = defaults.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    own = {name.removeprefix("model.") for name in built.state_dict()}
    weights = _named_as(own, state, heads, model.prefix, Source(path))
    if weights is None:
        if path.is_dir():
            weights = Weights("timm", under("model.", state), {})  # what does not fit is listed
        else:
            weights = load_official(path, prefix=model.prefix)
    elif weights.facts is None:
        plain = {name.removeprefix("model."): tensor for name, tensor in weights.backbone.items()}
        weights = replace(weights, facts=facts_of("vit", plain, state, {}))
    record = {} if path.is_dir() else {"sha256": _sha256(path)}
    return _SourceContents(described, weights, f"timm/{model.timm} with {path.name}", mean, std, record=record)


def _named_as(
    own: set[str], state: State, heads: tuple[str, ...], prefix: str | None, source: Source
) -> Weights | None:
    """A state that has timm's names, maybe below a prefix; a classifier is left out. None: it has other names."""

    def read(part: State) -> Weights | None:
        kept = {name: tensor for name, tensor in part.items() if not (heads and name.startswith(heads))}
        left_out = tuple(name for name in part if name not in kept)
        return Weights("timm", under("model.", kept), {}, left_out=left_out) if kept.keys() <= own else None

    if prefix is None and (weights := read(state)) is not None:
        return weights
    anchors = (min(own),)
    if prefix is None:
        found = {
            chosen: weights for chosen, weights in search(state, anchors, read, source).items() if weights.backbone
        }
    else:
        chosen, part = part_below(state, prefix, anchors, source)
        found = {} if (weights := read(part)) is None else {chosen: weights}
    if not found:
        return None
    chosen, weights = the_only(found, source)
    left_out = (*(f"{chosen}{name}" for name in weights.left_out), *(n for n in state if not n.startswith(chosen)))
    return replace(weights, left_out=left_out, converted=(f"prefix {chosen} removed",))


_READERS: dict[str, Callable[[ModelSource], _SourceContents]] = {
    "release": _of_release,
    "official": _of_official,
    "timm": _of_timm,
    "huggingface": _of_huggingface,
}


def _described(model: ModelSource, weights: Weights) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The recipe of the ViT that the weights belong to, as `ViT.release_model` returns it."""
    state, grid = weights.backbone, weights.grid
    if depth := resnet_depth(state):
        size = model.size or (DEFAULT_SIDE, DEFAULT_SIDE)
        described = {
            "class": "timm",
            "name": f"resnet{depth}",
            "img_size": size,
            "in_chans": state["conv1.weight"].shape[1],
        }
        return described, (f"a ResNet of {depth} layers: timm/resnet{depth}",)
    if "patch_embed.proj.weight" not in state:
        raise ValueError(
            f"the weights ({weights.kind}) are not of a plain ViT; name their model: model.timm=NAME model.weights=FILE"
        )
    described: dict[str, Any] = {"class": "vit"}
    has_positions = any(name == "pos_embed" or name.endswith("relative_position_bias_table") for name in state)
    if not has_positions:
        patch = state["patch_embed.proj.weight"].shape[-1]
        height, width = model.size or (DEFAULT_SIDE, DEFAULT_SIDE)
        grid = (height // patch, width // patch)
    described |= recipe(weights, num_heads=model.args.get("num_heads"), grid=grid)
    if not has_positions and described["pos_embed"] != "rope" and "pos_embed" not in model.args:
        raise ValueError(
            "no position table, and not DINOv3 by its registers or periods; state model.args.pos_embed: rope where "
            "positions rotate as in DINOv3 (then also model.args.norm_eps), or none"
        )
    return described, () if weights.facts is None else (f"facts of the file that no weight shows: {weights.facts}",)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The state in the weight files of a folder: one file, or the parts listed in an index."""
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            pieces = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(piece).name != piece for piece in pieces):
                raise ValueError(f"{index}: lists files outside its folder")
            return {key: tensor for piece in pieces for key, tensor in read_state(folder / piece).items()}
        if (folder / name).is_file():
            return read_state(folder / name)
    raise ValueError(f"{folder}: contains no weights; expected one of {', '.join(_WEIGHT_FILES)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

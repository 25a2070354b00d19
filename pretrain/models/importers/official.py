"""Checkpoints of other projects; the kind of a file is recognized by its parameter names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pretrain.models.importers import distilled, libraries, masked, prefixes
from pretrain.models.importers.facts import facts_of
from pretrain.models.importers.files import StateFile, read_file
from pretrain.models.importers.huggingface.names import huggingface
from pretrain.models.importers.names import CLASSIFIER, MEAN_POOLED, is_vit, square_grid, take, to_vit
from pretrain.models.importers.weights import Facts, Grid, Source, State, Weights, below, some
from pretrain.models.layers.pos_embed import PosResize

# Copies of the weights next to them, as BEiT, timm, mmengine and Lightning save them.
AVERAGES = ("model_ema.", "state_dict_ema.", "ema.", "ema_state_dict.", "current_model_state.", "averaging_state.")
KNOWN = (
    "MAE, VideoMAE, DINO, iBOT, DINOv2, DINOv3, BEiT, VQ-KD, MoCo v3, SimMIM, I-JEPA, data2vec, ViTs of timm, "
    "Hugging Face, torchvision and mmpretrain, ResNets, and these below a prefix"
)
# Weights that one of the known forms has, by which their prefix is found.
_ANCHORS = (
    "patch_embed.proj.weight",
    "patch_embed.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "conv_proj.weight",
    "layer1.0.conv1.weight",
    "4.0.conv1.weight",
)


def load_official(path: Path | str, *, prefix: str | None = None, grid: Grid | None = None) -> Weights:
    """Read a checkpoint file and find out by its names what it is.

    Frameworks save a network below a prefix, or several copies of it (student, teacher, EMA). Where exactly one prefix
    leaves a known form, it is removed, and `converted` of the result says so.

    Args:
        prefix: of the names to read, where several fit; the others are left out.
        grid: rows and columns of its position tables; None: they are square.

    Raises:
        ValueError: the file is missing or unreadable, holds more than tensors and plain values, or is of no known kind;
            or several networks in it fit, which are listed.
    """
    file, source = read_file(Path(path)), Source(path, grid, Path(path).parent)
    chosen, weights = _network(file.state, prefix, source)
    left_out, converted = weights.left_out, weights.converted
    if chosen:
        left_out = tuple(f"{chosen}{name}" for name in left_out)
        left_out += tuple(name for name in file.state if not name.startswith(chosen))
        converted = (f"prefix {chosen} removed", *converted)
    left_out += tuple(f"objects of {name}, which were not made" for name in file.foreign)
    found = grid or square_grid(weights.backbone)
    facts = weights.facts or _facts(weights, file, chosen, source)
    how = _rule_of(weights, found)
    return replace(weights, grid=found, left_out=left_out, converted=converted, pos_resize=how, facts=facts)


def _facts(weights: Weights, file: StateFile, prefix: str, source: Source) -> Facts | None:
    try:
        return facts_of(weights.kind, weights.backbone, below(file.state, prefix), file.settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _rule_of(weights: Weights, grid: Grid | None) -> PosResize:
    """How the project resamples positions: DINO, iBOT and DINOv2 by a scale factor, DINOv2 with registers smoothed.

    A released backbone of DINOv2 is known by its 37 x 37 patches of 14 pixels and its layer scale.
    """
    state = weights.backbone
    released = grid == (37, 37) and state["patch_embed.proj.weight"].shape[-1] == 14 and "blocks.0.ls1.gamma" in state
    if weights.kind == "dinov2" or released:
        return "antialias" if "reg_token" in state else "dino"
    return "dino" if weights.kind in ("dino", "ibot") else "exact"


def _network(state: State, prefix: str | None, source: Source) -> tuple[str, Weights]:
    """The prefix that was removed, if any, and the network below it."""
    if prefix is not None:
        chosen, inner = prefixes.part_below(state, prefix, _ANCHORS, source)
        weights = _recognized(inner, source)
        if weights is None:
            raise ValueError(f"{source}: below {chosen} no network we know ({KNOWN}), but {some(sorted(inner))}")
        return chosen, weights
    try:
        if (weights := _recognized(state, source)) is not None:
            return "", weights
    except ValueError as error:
        others = _innermost(prefixes.search(state, _ANCHORS, lambda part: _quietly(part, source), source))
        if not others:
            raise
        raise ValueError(f"{error}; to read one backbone alone, {prefixes.choose_among(list(others))}") from error
    found = _innermost(prefixes.search(state, _ANCHORS, lambda part: _recognized(part, source), source))
    if not found:
        raise ValueError(f"{source}: not a checkpoint we know ({KNOWN}); its first keys are {some(sorted(state))}")
    return prefixes.the_only(found, source)


def _innermost(found: dict[str, Weights]) -> dict[str, Weights]:
    """One prefix for each network: a complete objective stands for its networks, else the longest prefix counts."""
    complete = [prefix for prefix, weights in found.items() if weights.heads]
    kept = {}
    for prefix, weights in found.items():
        inside = any(prefix != other and prefix.startswith(other) for other in complete)
        around = prefix not in complete and any(prefix != other and other.startswith(prefix) for other in found)
        if not inside and not around:
            kept[prefix] = weights
    return kept


def _quietly(state: State, source: Source) -> Weights | None:
    try:
        return _recognized(state, source)
    except ValueError:
        return None


def _recognized(state: State, source: Source) -> Weights | None:
    for form in FORMS:
        try:
            found = form(dict(state), source)
        except (KeyError, IndexError) as error:
            what = form.__name__.strip("_")
            raise ValueError(f"{source}: an incomplete checkpoint ({what}): it has no {error}") from error
        if found is not None:
            return found
    return None


def _backbone(state: State, source: Source) -> Weights | None:
    """A vision transformer alone, or with a classifier."""
    if all(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    if not is_vit(state):
        return None
    left_out = take(state, *CLASSIFIER, "mask_token", "masked_embed", "lm_head.", "local_cls_norm.", *AVERAGES)
    if "norm.weight" not in state and "fc_norm.weight" in left_out:
        raise ValueError(f"{source}: {MEAN_POOLED}")
    return Weights("vit", to_vit(state, source), {}, left_out=tuple(left_out))


# The first that recognizes a state reads it; it may empty its copy.
FORMS: tuple[Callable[[State, Source], Weights | None], ...] = (
    huggingface,
    libraries.torchvision_vit,
    libraries.mmpretrain_vit,
    libraries.resnet,
    distilled.ijepa,
    distilled.mocov3,
    distilled.dino,
    distilled.dinov2,
    masked.vqkd,
    masked.simmim,
    masked.videomae,
    masked.mae,
    masked.beit,
    _backbone,
)

"""Runs Fovea on the golden cases of SimMIM: with a ViT, and with timm's Swin under the official names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs.simmim import SimMIMConfig
from pretrain.objectives.simmim import SimMIM
from tests.golden.case import Case, rel_pos_kind

TABLES_OF_INDICES = ("relative_position_index", "attn_mask")  # computed, not learned
NEUTRAL = {"drop_rate": 0, "attn_drop_rate": 0, "drop_path_rate": 0, "num_classes": 0}


def run_vit(case: Case) -> None:
    ctor = case.take(
        "ctor", "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
        "init_values", "use_abs_pos_emb", "use_shared_rel_pos_bias", "use_rel_pos_bias", "use_mean_pooling", "norm_eps",
        "qk_scale",
        neutral=NEUTRAL,
    )  # fmt: skip
    assert case.config["stride"] == ctor["patch_size"], "a ViT predicts the pixels of its own patches"
    vit = ViT(
        _size(ctor),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor["embed_dim"],
        ctor["depth"],
        ctor["num_heads"],
        ctor.get("mlp_ratio", 4.0),
        pos_embed="learned" if ctor.get("use_abs_pos_emb", True) else "none",
        rel_pos_bias=rel_pos_kind(ctor),
        qkv_bias="no_key" if ctor.get("qkv_bias", True) else False,
        qk_scale=ctor.get("qk_scale") or None,
        layer_scale=ctor.get("init_values") or None,
        norm_eps=ctor.get("norm_eps", 1e-6),
    )
    _run(case, vit, _vit_name)


def run_swin(case: Case) -> None:
    """timm's Swin: the official one merges patches at the end of a stage, timm's at the start of the next."""
    ctor = case.take(
        "ctor", "img_size", "patch_size", "in_chans", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio",
        "qkv_bias", "qk_scale", "ape", "patch_norm", neutral=NEUTRAL | {"use_checkpoint": False},
    )  # fmt: skip
    given = {
        key: ctor[key] for key in ("patch_size", "embed_dim", "window_size", "mlp_ratio", "qkv_bias") if key in ctor
    }
    given |= {key: tuple(ctor[key]) for key in ("depths", "num_heads")}
    given |= {"ape": ctor.get("ape", False), "patch_norm": ctor.get("patch_norm", True)}
    given["qk_scale"] = ctor.get("qk_scale") or None
    swin = TimmBackbone("swin_tiny_patch4_window7_224", _size(ctor), ctor.get("in_chans", 3), **given)
    assert swin.patch_size == case.config["stride"], "the stride is that of the last stage"
    _run(case, swin, _swin_name)


def _run(case: Case, backbone: Backbone, ours: Callable[[str], str]) -> None:
    case.only("seed", "batch", "swin", "stride", "mask_patch_size", "mask_ratio", "ctor")
    config = SimMIMConfig(mask_cell=case.config["mask_patch_size"], mask_ratio=case.config["mask_ratio"])
    objective = SimMIM(config, backbone, Horizon(total_steps=1, steps_per_epoch=1))
    state = case.below("state")
    learned = {name: value for name, value in state.items() if not name.endswith(TABLES_OF_INDICES)}
    objective.load_state_dict({ours(name): _without_kernel(value) for name, value in learned.items()})
    images = _without_ties(case)
    batch = {"image": images[:, None], "mask_noise": _noise(case, config)}
    objective.train()
    losses = objective(batch, 0)
    losses["loss"].backward()
    case.check("expect/loss", losses["loss"])
    cells = objective.cells(images, batch["mask_noise"])
    with torch.no_grad():
        tokens = objective.encode(images, cells)
        grid = (images.shape[2] // backbone.patch_size, images.shape[3] // backbone.patch_size)
        case.check("expect/z", tokens.transpose(1, 2).unflatten(2, grid))
        case.check("expect/reconstruction", objective.reconstruct(tokens, grid))
    parameters = dict(objective.named_parameters())
    for name, expect in case.below("grad").items():
        gradient = parameters[ours(name)].grad
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient.view(expect.shape) if gradient.numel() == expect.numel() else gradient)
    _check_groups(case, objective, {ours(name): name for name in learned})


def _check_groups(case: Case, objective: SimMIM, theirs: dict[str, str]) -> None:
    """What does not decay, as in the table of the case."""
    groups = objective.param_groups()
    found = {theirs[name] for group in groups if not group["weight_decay_scale"] for name in group["names"]}
    table = set(case.facts["tables"]["no-weight-decay parameters"])
    assert found == table, f"{case.name}: weight decay differs for {sorted(found ^ table)}"
    still = set(case.facts["tables"]["parameters without gradient"])
    assert not still, f"{case.name}: the official code does not train {sorted(still)}"


def _noise(case: Case, config: SimMIMConfig) -> Tensor:
    """Numbers whose ranks mask what the case masks; its mask is on the patches that the encoder embeds."""
    mask = case["input/mask"]
    per_cell = config.mask_cell // case.config["ctor"]["patch_size"]
    cells = mask[:, ::per_cell, ::per_cell]
    assert torch.equal(cells.repeat_interleave(per_cell, 1).repeat_interleave(per_cell, 2), mask)
    assert (cells.flatten(1).sum(1) == config.num_masked(cells[0].numel())).all(), "the count is not as configured"
    return cells.flatten(1).float()


def _without_ties(case: Case) -> Tensor:
    """The images, where a pixel equals its prediction up to rounding moved a little to the side of it that it was on.

    |x| has two slopes at 0: one such pixel flips a sign in every gradient. It is masked, so it is a target only.
    """
    images, predicted = case["input/images"], case["expect/reconstruction"]
    limit = case.tolerance("expect/reconstruction")[0]
    masked = case["input/mask"].repeat_interleave(images.shape[2] // case["input/mask"].shape[1], 1)
    masked = masked.repeat_interleave(images.shape[3] // case["input/mask"].shape[2], 2)[:, None] == 1
    error = images - predicted
    return torch.where(masked & (error.abs() < limit), images + limit * error.sign(), images)


def _vit_name(name: str) -> str:
    name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
    return _outer_name(name)


def _swin_name(name: str) -> str:
    name = name.replace("encoder.absolute_pos_embed", "encoder.layers.0.absolute_pos_embed")
    name = re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
    return _outer_name(name.replace("encoder.", "encoder.model.") if name != "encoder.mask_token" else name)


def _outer_name(name: str) -> str:
    return "mask_token" if name == "encoder.mask_token" else name.replace("decoder.0.", "decoder.")


def _without_kernel(value: Tensor) -> Tensor:
    """A 1 x 1 convolution as a matrix."""
    return value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value


def _size(ctor: dict[str, Any]) -> tuple[int, int]:
    side = ctor["img_size"]
    return tuple(side) if isinstance(side, list) else (side, side)

"""Official checkpoints made of the golden cases: their states, packed as the official code packs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon, Objective
from pretrain.objectives.beit import BEiT
from pretrain.objectives.configs import BEiTConfig, DINOConfig, MAEConfig, SimMIMConfig, VQKDConfig
from pretrain.objectives.dino import DINO
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM
from pretrain.objectives.vqkd import VQKD
from tests.golden import beit as golden_beit
from tests.golden import beit2 as golden_beit2
from tests.golden import dino_steps, dinov2, ibot, ijepa, mae, mocov3
from tests.golden import simmim as golden_simmim
from tests.golden.case import Case

CASES = Path(__file__).parents[2] / "golden" / "cases"
ARGS = argparse.Namespace(model="vit", lr=1e-3, output_dir="out")
# What the official code keeps and never reads.
UNREAD = (
    "teacher.backbone.mask_token",
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
)
State = dict[str, Tensor]


def case(name: str) -> Case:
    return Case(CASES / f"{name}.json")


def state(name: str) -> State:
    return case(name).below("state")


def below(values: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def under(prefix: str, values: State) -> State:
    return {prefix + name: value for name, value in values.items()}


def _two_networks(values: State, loss: str) -> dict[str, Any]:
    """DINO and iBOT: DDP wraps the student only."""
    return {
        "student": under("module.", below(values, "student.")),
        "teacher": below(values, "teacher."),
        loss: below(values, f"{loss}."),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": ARGS,
    }


def _by_network(values: State) -> dict[str, Any]:
    """I-JEPA."""
    networks = ("encoder", "predictor", "target_encoder")
    return {name: under("module.", below(values, f"{name}.")) for name in networks} | {"opt": {}, "epoch": 1, "lr": 0.1}


def _chunked(values: State) -> State:
    """DINOv2 with its blocks in chunks, sharded and checkpointed."""
    names = (name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.") for name in values)
    names = (name.replace("backbone.", "backbone._fsdp_wrapped_module._checkpoint_wrapped_module.") for name in names)
    return dict(zip(names, values.values(), strict=True))


PACKED: dict[str, Callable[[State], Any]] = {
    "mae_pretrain_normpix": lambda values: {"model": values, "optimizer": {}, "epoch": 3, "args": ARGS},
    "dino_step_sgd_freelast": lambda values: _two_networks(values, "dino_loss"),
    "ibot_step_separate": lambda values: _two_networks(values, "ibot_loss"),
    "ibot_step_shared": lambda values: _two_networks(values, "ibot_loss"),
    "dinov2_ssl_centering": lambda values: {"model": _chunked(values), "iteration": 7},
    "mocov3_step": lambda values: {"state_dict": under("module.", values), "arch": "vit_small", "epoch": 2},
    "beit_pretrain": lambda values: {"model": values, "args": ARGS, "scaler": {"scale": 1.0}},
    "simmim_vit": lambda values: {"model": values, "max_accuracy": 0.0, "epoch": 1},
    "simmim_swin": lambda values: {"model": values, "max_accuracy": 0.0, "epoch": 1},
    "ijepa_step": _by_network,
    "beit2_vqkd": lambda values: {"model": values, "epoch": 1, "args": ARGS},
}


def objective(name: str) -> tuple[Objective, State]:
    """The objective of a case with fresh weights, and the state that the case's would give it."""
    of, values = case(name), state(name)
    if name == "beit2_vqkd":
        return _vqkd(of)
    ctor = of.config["ctor"]
    values = {key: value for key, value in values.items() if not key.endswith(("position_index", "attn_mask"))}
    if name.startswith("mae"):
        return _mae(ctor), {mae.ours(key): value for key, value in values.items()}
    if name.startswith("dino_"):
        made: Objective = dino_steps.build(of)[0]
        center = values.pop("dino_loss.center")
        renamed = {key.replace("teacher.", "teacher.average.", 1): value for key, value in values.items()}
        return made, renamed | {"center": center}
    if name.startswith("ibot"):
        return ibot.build(of)[0], ibot.ours(of)
    if name.startswith("dinov2"):
        return dinov2.build(of), dinov2.ours(of)
    if name.startswith("mocov3"):
        return mocov3.build(of)[0], {mocov3.ours(key): value for key, value in values.items()}
    if name.startswith("ijepa"):
        return ijepa.build(of)[0], {ijepa.ours(key): value for key, value in values.items()}
    if name.startswith("beit"):
        tokenizer = golden_beit.GivenTokens(torch.zeros(1), ctor["vocab_size"])
        made = BEiT(BEiTConfig(tokenizer="given"), beit_vit(ctor), Horizon(1, 1), tokenizer=tokenizer)
        return made, {golden_beit.ours(key): value for key, value in values.items()}
    config = SimMIMConfig(mask_cell=of.config["mask_patch_size"])
    named = golden_simmim._swin_name if "swin" in name else golden_simmim._vit_name
    backbone = _swin(ctor) if "swin" in name else beit_vit(ctor)
    return SimMIM(config, backbone, Horizon(1, 1)), {
        named(key): golden_simmim._without_kernel(value) for key, value in values.items()
    }


def beit_vit(ctor: dict[str, Any], **options: Any) -> ViT:
    """With BEiT's shared table, biases and layer scale."""
    given = {"pos_embed": "none", "rel_pos_bias": "shared", "qkv_bias": "no_key", "layer_scale": 0.1} | options
    return ViT(*sizes(ctor), **given)


def sizes(ctor: dict[str, Any]) -> tuple[Any, ...]:
    side = ctor["img_size"]
    widths = (ctor[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio"))
    return (side, side), ctor["patch_size"], ctor.get("in_chans", 3), *widths


def _mae(ctor: dict[str, Any]) -> MAE:
    decoder = {key: ctor[key] for key in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
    return MAE(MAEConfig(**decoder), ViT(*sizes(ctor)), Horizon(1, 1))


def _vqkd(of: Case) -> tuple[VQKD, State]:
    config, sides = of.config, {"num_codes": "n_code", "code_dim": "code_dim"}
    given = {ours: config[theirs] for ours, theirs in sides.items()}
    given |= {f"decoder_{key}": value for key, value in config["dec"].items()}
    widths = [config["enc"][key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")]
    side = config["img_size"]
    vit = ViT((side, side), config["patch_size"], 3, *widths, pos_embed="learned", qkv_bias="no_key")
    teacher = golden_beit2.GivenFeatures(of["input/target"])
    made = VQKD(VQKDConfig(teacher="given", **given), vit, Horizon(1, 1), teacher=teacher)
    kept = {k: v for k, v in of.below("state").items() if k not in UNREAD}
    return made, {golden_beit2.ours(key): value for key, value in kept.items()}


def _swin(ctor: dict[str, Any]) -> Any:
    given = {key: ctor[key] for key in ("patch_size", "embed_dim", "window_size", "mlp_ratio")}
    given |= {key: tuple(ctor[key]) for key in ("depths", "num_heads")}
    return TimmBackbone("swin_tiny_patch4_window7_224", (ctor["img_size"],) * 2, **given)


def small_dino(backbone: ViT) -> DINO:
    config = DINOConfig(out_dim=16, head_hidden_dim=8, head_bottleneck_dim=8, local_crops_number=2, drop_path_rate=0.0)
    return DINO(config, backbone, Horizon(1, 1))


def small_mae(backbone: ViT) -> MAE:
    config = MAEConfig(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    return MAE(config, backbone, Horizon(1, 1))

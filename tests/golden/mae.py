"""Runs Fovea on the golden cases of MAE."""

from __future__ import annotations

import re

import torch

from pretrain.core.schedule import warmup_cosine
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.patches import patchify, unpatchify
from pretrain.models.layers.pos_embed import resize, sincos_2d
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import MAEConfig
from pretrain.objectives.mae import MAE
from tests.golden.case import Case, key_third


def run_pretrain(case: Case) -> None:
    known = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_pix_loss")
    decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    ctor = case.take("ctor", *known, *decoder, "in_chans")
    side, patch = ctor["img_size"], ctor["patch_size"]
    backbone = ViT(
        (side, side), patch, ctor.get("in_chans", 3), ctor["embed_dim"], ctor["depth"], ctor["num_heads"],
        ctor.get("mlp_ratio", 4.0),
    )  # fmt: skip
    config = MAEConfig(
        mask_ratio=case.config["mask_ratio"],
        norm_pix_loss=ctor.get("norm_pix_loss", False),
        **{name: ctor[name] for name in decoder if name in ctor},
    )
    mae = MAE(config, backbone, Horizon(total_steps=1, steps_per_epoch=1)).train()
    mae.load_state_dict({ours(name): value for name, value in case.below("state").items()})

    images, noise = case["input/images"], case["draw/noise"]
    losses = mae({"image": images[:, None], "mask_noise": noise}, 0)
    losses["loss"].backward()
    keep, masked = mae.split(noise)
    latent, pred = mae.predict(images, keep, masked)
    grid = (side // patch, side // patch)
    case.check("expect/loss", losses["loss"])
    case.check("expect/pred", pred)
    case.check("expect/mask", torch.zeros_like(noise).scatter(1, masked, 1.0))
    case.check("expect/ids_restore", torch.cat([keep, masked], dim=1).argsort(dim=1))
    case.check("expect/ids_keep", keep)
    case.check("expect/latent", latent)
    case.check("expect/patchify", patchify(images, patch))
    case.check("expect/unpatchify_pred", unpatchify(pred, patch, grid))
    gradients = {name: parameter.grad for name, parameter in mae.named_parameters()}
    for name, expect in case.below("grad").items():
        gradient = gradients[ours(name)]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient, zero=key_third(name, expect))


def run_sincos(case: Case) -> None:
    for key in case.below("expect"):
        found = re.fullmatch(r"table_d(\d+)_g(\d+)_cls([01])", key)
        assert found, f"{case.name}: cannot read the size of table {key}"
        dim, side, cls_row = (int(number) for number in found.groups())
        assert [dim, side, bool(cls_row)] in case.config["tables"]
        case.check(f"expect/{key}", sincos_2d(dim, (side, side), cls_row=bool(cls_row)))


def run_interpolate(case: Case) -> None:
    old, new = case.config["old"], case.config["new"]
    case.check("expect/pos_embed", resize(case["input/pos_embed"], (old, old), (new, new), how="exact"))


def run_lr_schedule(case: Case) -> None:
    args, per_epoch = case.take("args", "lr", "min_lr", "warmup_epochs", "epochs"), case.config["iters_per_epoch"]
    total = args["epochs"] * per_epoch
    lr = [
        warmup_cosine(
            step,
            peak=args["lr"],
            final=args["min_lr"],
            warmup_steps=args["warmup_epochs"] * per_epoch,
            total_steps=total,
            warmup_form="open",
        )
        for step in range(total)
    ]
    table = torch.tensor(lr, dtype=torch.float64)
    case.check("expect/lr", table)
    case.check("expect/group0_lr", table)
    case.check("expect/group1_lr", table * case.config["lr_scale"])


def ours(name: str) -> str:
    """Our name of a parameter of the official model."""
    if name == "mask_token":
        return "decoder.mask_token"
    return name.replace("decoder_", "decoder.", 1) if name.startswith("decoder_") else f"encoder.{name}"

"""Runs Fovea's MAE in the form of Pixio on the golden cases of Pixio."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.schedule import warmup_cosine
from pretrain.data.write.curate import Rule, Scores, kept
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers.masked import mae as read_checkpoint
from pretrain.models.importers.weights import Source
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import MAEConfig
from pretrain.objectives.mae import MAE
from tests.golden.case import Case, key_third
from tests.golden.mae import ours


def run_pretrain(case: Case) -> None:
    case.only("batch", "mask_ratio", "ctor")
    objective = build(case)
    objective.load_weights(read_checkpoint(dict(case.below("state")), Source("case", None)))
    images, noise = case["input/imgs"], case["draw/noise"]
    batch = {"image": images[:, None], "mask_noise": noise}
    if objective.encoder.drop_shape is not None:
        batch["drop_path"] = drops(case, len(images), objective.encoder.depth)
    losses = objective(batch, 0)
    losses["loss"].backward()
    keep, masked = objective.split(noise)
    latent = objective.encoder(images, keep=keep, drop=batch.get("drop_path"))
    case.check("expect/loss", losses["loss"])
    case.check("expect/latent", latent)
    case.check("expect/pred", objective.decoder.predict(latent, keep, masked))
    patches = keep.shape[1] + masked.shape[1]
    case.check("expect/mask", torch.zeros(len(images), patches).scatter(1, masked, 1.0))
    case.check("expect/ids_restore", torch.cat([keep, masked], dim=1).argsort(dim=1))
    found = gradients(objective)
    for name, expect in case.below("grad").items():
        case.check(f"grad/{name}", found[ours(name)], zero=key_third(name, expect))
    check_groups(case, objective)


def build(case: Case) -> MAE:
    known = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path")
    decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    ctor = case.take("ctor", *known, *decoder, "n_cls_tokens", "mask_grid", "norm_pix_loss")
    side = ctor["img_size"]
    backbone = ViT(
        (side, side), ctor["patch_size"], ctor.get("in_chans", 3), ctor["embed_dim"], ctor["depth"], ctor["num_heads"],
        ctor.get("mlp_ratio", 4.0), num_registers=ctor["n_cls_tokens"] - 1, drop_path_rate=ctor.get("drop_path", 0.0),
    )  # fmt: skip
    config = MAEConfig(
        mask_ratio=case.config["mask_ratio"],
        mask_grid=ctor["mask_grid"],
        norm_pix_loss=ctor.get("norm_pix_loss", True),
        positions="learned",
        registers_are_class_tokens=True,
        **{name: ctor[name] for name in decoder if name in ctor},
    )
    return MAE(config, backbone, Horizon(total_steps=1, steps_per_epoch=1)).train()


def drops(case: Case, images: int, depth: int) -> Tensor:
    """[b, depth, 2] from the numbers of each branch: there a sample keeps a branch when rate <= number too."""
    given = torch.ones(images, depth, 2)
    for block in range(depth):
        for branch, name in enumerate(("attn", "mlp")):
            key = f"draw/drop_path/block{block}/{name}"
            if key in case.tensors:
                given[:, block, branch] = case[key].flatten()
    return given


def gradients(objective: MAE) -> dict[str, Tensor]:
    """By our names; class tokens and rows of the position table are those of the official model."""
    found = {name: p.grad for name, p in objective.named_parameters()}
    further = found.pop("encoder.reg_token", None)
    if further is not None:
        for name in ("encoder.cls_token", "encoder.pos_embed"):
            first, rest = found[name].tensor_split([1], dim=1)
            found[name] = torch.cat([first, further, rest], dim=1)
    return found


def check_groups(case: Case, objective: MAE) -> None:
    """The parameters with weight decay and without; those of class tokens move as a token and its position."""
    scales: dict[str, float] = {}
    for group in objective.param_groups():
        scales |= dict.fromkeys(group["names"], group["weight_decay_scale"] * group["lr_scale"])
    for table, scale in (("weight decay", 1.0), ("no weight decay", 0.0)):
        wrong = [name for name in case.facts["tables"][table] if scales[ours(name)] != scale]
        assert not wrong, f"{case.name}: {table} of {wrong}"
    listed = {ours(name) for names in case.facts["tables"].values() for name in names} | {"encoder.reg_token"}
    assert scales.keys() <= listed, f"{case.name}: {sorted(scales.keys() - listed)} are not trained there"


def run_sampling(case: Case) -> None:
    case.only("n", "variants")
    columns = {name: case[f"input/{name}"].tolist() for name in ("mae_loss", "histogram_score", "height", "width")}
    for name, given in case.config["variants"].items():
        unknown = set(given) - {"soft_sampling", "hist_thresh", "imgres_thresh"}
        assert not unknown, f"{case.name}: options that the runner does not know: {sorted(unknown)}"
        rule = Rule(given.get("soft_sampling", False), given.get("hist_thresh"), given.get("imgres_thresh"))
        drawn = case["draw/uniform"].tolist()
        rest = iter(drawn)
        chosen = kept(case.config["n"], Scores(*columns.values()), rule, lambda _, rest=rest: next(rest))
        case.check(f"expect/{name}/accepted", torch.tensor(chosen))
        case.check(f"expect/{name}/draws_used", torch.tensor(len(drawn) - len(list(rest))))


def run_lr(case: Case) -> None:
    case.only("variants")
    for name, given in case.config["variants"].items():
        assert set(given) == {"blr", "batch", "min_lr", "warmup_epochs", "epochs", "iters"}
        peak, total = given["blr"] * given["batch"] / 256, given["epochs"] * given["iters"]
        warmup = given["warmup_epochs"] * given["iters"]
        lr = [
            warmup_cosine(
                step, peak=peak, final=given["min_lr"], warmup_steps=warmup, total_steps=total, warmup_form="open"
            )
            for step in range(total)
        ]
        case.check(f"expect/{name}", torch.tensor(lr, dtype=torch.float64))

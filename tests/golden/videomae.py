"""Runs Fovea on the golden cases of VideoMAE."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.sampling import keyed
from pretrain.models.backbones.video import VideoViT
from pretrain.models.importers.masked import videomae as read_checkpoint
from pretrain.models.importers.weights import Source
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import VideoMAEConfig
from pretrain.objectives.videomae import VideoMAE
from tests.golden.case import Case

_FRAMES = 16  # the official code builds its positions for no other number
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the official code, in its loss too
_EXACT_SIGMAS = 5.0


def run_pretrain(case: Case) -> None:
    case.only("batch", "mask_ratio", "normlize_target", "ctor")
    objective = build(case)
    weights = read_checkpoint(dict(case.below("state")), Source("case", None))
    assert weights is not None
    objective.load_weights(weights)
    clips, hidden = case["input/videos"].transpose(1, 2), case["input/mask"]
    keep, masked = (torch.stack([row.nonzero().flatten() for row in rows]) for rows in (~hidden, hidden))
    norm = torch.tensor([_MEAN, _STD]).view(2, 1, 1, 3, 1, 1)
    latent = objective.encoder(clips, keep=keep)
    pred, target = objective.decoder(latent, keep, masked), objective.target(clips * norm[1] + norm[0], masked)
    loss = (pred - target).square().mean()
    loss.backward()
    case.check("expect/latent", latent)
    case.check("expect/outputs", pred)
    case.check("expect/labels", target)
    case.check("expect/loss", loss)
    assert objective.encoder.pos_embed is not None
    case.check("expect/position_table", objective.encoder.pos_embed)
    found = {name: parameter.grad for name, parameter in objective.named_parameters()}
    for name in case.below("grad"):
        gradient = found[ours(name)]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient)
    check_objective(case, objective, loss, clips, norm, hidden)


def check_objective(case: Case, objective: VideoMAE, loss: Tensor, clips: Tensor, norm: Tensor, hidden: Tensor) -> None:
    """The loss of a batch whose noise gives these masks, where they are tubes of the configured ratio."""
    of_frame = hidden.unflatten(1, (objective.encoder.slices, -1))
    same = bool((of_frame == of_frame[:, :1]).all())
    kept = of_frame.shape[2] - int(of_frame[0, 0].sum())
    if not same or kept != objective.config.num_keep(of_frame.shape[2]):
        return
    batch = {"clip": clips, "pixels": clips * norm[1] + norm[0], "mask_noise": of_frame[:, 0].float()}
    torch.testing.assert_close(objective(batch, 0)["loss"], loss, rtol=1e-5, atol=1e-7)


def build(case: Case) -> VideoMAE:
    sizes = ("img_size", "patch_size", "tubelet_size", "mlp_ratio", "qkv_bias", "qk_scale", "init_values")
    encoder = ("encoder_in_chans", "encoder_embed_dim", "encoder_depth", "encoder_num_heads")
    decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decoder_num_classes", "use_checkpoint")
    neutral: dict[str, Any] = {"encoder_num_classes": 0, "num_classes": 0, "drop_rate": 0.0, "attn_drop_rate": 0.0}
    neutral |= {"drop_path_rate": 0.0, "use_learnable_pos_emb": False}
    ctor = case.take("ctor", *sizes, *encoder, *decoder, "in_chans", neutral=neutral)
    official = {"img_size": 224, "patch_size": 16, "tubelet_size": 2, "mlp_ratio": 4.0, "qkv_bias": False}
    official |= {"encoder_embed_dim": 768, "encoder_depth": 12, "encoder_num_heads": 12, "decoder_embed_dim": 512}
    official |= {"decoder_depth": 8, "decoder_num_heads": 8, "init_values": 0.0, "qk_scale": None}
    ctor = official | ctor
    assert ctor["tubelet_size"] == 2, (
        f"{case.name}: the official loss has tubes of 2 frames, not {ctor['tubelet_size']}"
    )
    side = ctor["img_size"]
    backbone = VideoViT(
        (side, side) if isinstance(side, int) else tuple(side),
        ctor["patch_size"],
        in_chans=ctor.get("encoder_in_chans", 3),
        embed_dim=ctor["encoder_embed_dim"],
        depth=ctor["encoder_depth"],
        num_heads=ctor["encoder_num_heads"],
        mlp_ratio=ctor["mlp_ratio"],
        num_frames=_FRAMES,
        tubelet_size=ctor["tubelet_size"],
        class_token=False,
        qkv_bias="no_key" if ctor["qkv_bias"] else False,
        qk_scale=ctor["qk_scale"] or None,
        layer_scale=ctor["init_values"] or None,
        norm_eps=1e-6,
    )
    config = VideoMAEConfig(
        mask_ratio=case.config["mask_ratio"],
        norm_pix_loss=case.config["normlize_target"],
        **{name: ctor[name] for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")},
    )
    return VideoMAE(config, backbone, Horizon(total_steps=1, steps_per_epoch=1)).train()


def ours(name: str) -> str:
    """Our name of a parameter of the official model."""
    name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
    whole = {"mask_token": "decoder.mask_token", "encoder_to_decoder.weight": "decoder.embed.weight"}
    return whole.get(name, name.replace("decoder.head.", "decoder.pred."))


def run_tubes(case: Case) -> None:
    """What is certain of the masks exactly, how often a position is masked within the error of both samples."""
    case.only("grid", "mask_ratio", "n")
    slices, rows, columns = case.config["grid"]
    patches, draws = rows * columns, case.config["n"]
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 1, "num_frames": 2 * slices, "class_token": False}
    decoder: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}
    config = VideoMAEConfig(mask_ratio=case.config["mask_ratio"], **decoder)
    objective = VideoMAE(config, VideoViT((rows, columns), 1, **sizes), Horizon(total_steps=1, steps_per_epoch=1))
    numbers = [keyed.generator(0, place, 7).random(patches, dtype=np.float32) for place in range(draws)]
    _, masked = objective.split(torch.from_numpy(np.stack(numbers)))
    hidden = torch.zeros(draws, slices * patches, dtype=torch.bool).scatter(1, masked, True)
    of_frame = hidden.unflatten(1, (slices, patches))
    case.check("expect/total_masks", hidden[0].sum())
    case.check("expect/masks_per_frame", of_frame[0, 0].sum())
    case.check("expect/all_are_tubes", (of_frame == of_frame[:, :1]).all())
    first = case["expect/first"]
    case.due.discard("expect/first")
    counts = first.unflatten(1, (slices, patches)).sum(2)
    if not bool((counts == of_frame[0].sum(1)).all()) or first.shape[1] != hidden.shape[1]:
        case.mismatches.append("expect/first: masks that ours cannot be")
    theirs, mine = case["expect/masked_per_position"].double(), of_frame[:, 0].sum(0).double()
    case.due.discard("expect/masked_per_position")
    share = float(of_frame[0, 0].double().mean())
    limit = _EXACT_SIGMAS * (2 * draws * share * (1 - share)) ** 0.5
    if float((theirs - mine).abs().max()) > limit:
        case.mismatches.append(f"expect/masked_per_position: off by {(theirs - mine).abs().max()}, allowed {limit:.0f}")

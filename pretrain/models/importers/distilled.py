"""Checkpoints of self-distillation and related methods: DINO, iBOT, DINOv2, MoCo v3, I-JEPA."""

from __future__ import annotations

import torch

from pretrain.models.importers.names import is_vit, mask_token, take, to_vit
from pretrain.models.importers.weights import Source, State, Weights, below, some, under

BRANCHES = ("student.", "teacher.")


def dino(state: State, source: Source) -> Weights | None:
    """DINO and iBOT: `student` and `teacher` with backbone and head, and the loss with its centres."""
    branches = {name: below(state, name) for name in BRANCHES}
    if not any("head.mlp.0.weight" in branch or "head.mlp.weight" in branch for branch in branches.values()):
        return None
    is_ibot = "ibot_loss.center" in state or "student.backbone.masked_embed" in state
    kind = "ibot" if is_ibot else "dino"
    centres = below(state, f"{kind}_loss.")
    strange = [
        name
        for name in state
        if not name.startswith((f"{kind}_loss.", *(b + part for b in BRANCHES for part in ("backbone.", "head."))))
    ]
    lacking = [] if "center" in centres else [f"it has no {kind}_loss.center"]
    lacking += [f"it has no {name.removesuffix('.')}" for name, branch in branches.items() if not branch]
    if strange or lacking:
        title = {"dino": "DINO", "ibot": "iBOT"}[kind]
        raise ValueError(f"{source}: not a full {title} checkpoint: {some(strange) or '; '.join(lacking)}")
    heads: State = {"center": centres["center"]}
    backbones = {name: below(branch, "backbone.") for name, branch in branches.items()}
    if is_ibot:
        heads["patch_center"] = centres["center2"].reshape(1, -1)
        heads["mask_token"] = mask_token(backbones["student."].pop("masked_embed"))
    heads |= under("student.backbone.", to_vit(backbones["student."], source))
    heads |= under("student.head.", _untied(below(branches["student."], "head.")))
    heads |= under("teacher.average.head.", _untied(below(branches["teacher."], "head.")))
    left_out = tuple(f"teacher.backbone.{name}" for name in take(backbones["teacher."], "masked_embed"))
    return Weights(kind, to_vit(backbones["teacher."], source), heads, left_out=left_out)


def dinov2(state: State, source: Source) -> Weights | None:
    """A complete model (student and teacher with `dino_head`, losses), or the teacher that evaluations read."""
    branches = {name: below(state, name) for name in BRANCHES}
    teacher, student = branches["teacher."], branches["student."]
    if not is_vit(below(teacher, "backbone.")):
        return None
    backbone = below(teacher, "backbone.")
    left_out = [f"teacher.backbone.{name}" for name in take(backbone, "mask_token")]
    if not is_vit(below(student, "backbone.")):
        left_out += [name for name in state if not name.startswith("teacher.backbone.")]
        return Weights("vit", to_vit(backbone, source), {}, left_out=tuple(left_out))
    heads: State = {}
    follower = below(student, "backbone.")
    heads |= {name: mask_token(token) for name, token in take(follower, "mask_token").items()}
    heads |= under("student.backbone.", to_vit(follower, source))
    for part in ("dino_head.", "ibot_head."):
        heads |= under(f"student.{part}", below(student, part))
        heads |= under(f"teacher.average.{part}", below(teacher, part))
    last = (f"student.{head}.last_layer.weight_v" for head in ("dino_head", "ibot_head"))
    prototypes = [len(state[name]) for name in last if name in state]
    centres = ("dino_loss.center", "ibot_patch_loss.center")
    without = not any(name in state for name in centres)  # with Sinkhorn-Knopp there are none, or they stay zero
    for name, official, count in zip(("center", "patch_center"), centres, (prototypes[0], prototypes[-1]), strict=True):
        heads[name] = torch.zeros(1, count) if without else state[official].reshape(1, -1)
    known = (*(b + part for b in BRANCHES for part in ("backbone.", "dino_head.", "ibot_head.")),)
    left_out += [name for name in state if not name.startswith(known) and name not in centres]
    return Weights("dinov2", to_vit(backbone, source), heads, left_out=tuple(left_out))


def mocov3(state: State, source: Source) -> Weights | None:
    """`base_encoder` with its projector as head, `momentum_encoder`, `predictor`; a ViT, or a CNN in timm's names."""
    base, momentum = below(state, "base_encoder."), below(state, "momentum_encoder.")
    if not base:
        return None
    heads = under("predictor.", below(state, "predictor."))
    encoders = {}
    for place, encoder in (("base.", base), ("momentum_encoder.average.", momentum)):
        heads |= under(f"{place}projector.", below(take(encoder, "head.", "fc."), "head.", "fc."))
        encoders[place] = to_vit(encoder, source) if is_vit(encoder) else encoder
    heads |= under("momentum_encoder.average.backbone.", encoders["momentum_encoder.average."]) if momentum else {}
    left_out = tuple(n for n in state if not n.startswith(("base_encoder.", "momentum_encoder.", "predictor.")))
    return Weights("mocov3", encoders["base."], heads, left_out=left_out)


def ijepa(state: State, source: Source) -> Weights | None:
    """`encoder`, `predictor` and `target_encoder`, the one that is evaluated."""
    target = below(state, "target_encoder.")
    if not target:
        return None
    heads = under("encoder.", to_vit(below(state, "encoder."), source))
    predictor = below(state, "predictor.")
    heads |= {f"predictor.{name.removeprefix('predictor_')}": tensor for name, tensor in predictor.items()}
    left_out = tuple(n for n in state if not n.startswith(("encoder.", "target_encoder.", "predictor.")))
    return Weights("ijepa", to_vit(target, source), heads, left_out=left_out)


def _untied(head: State) -> State:
    """iBOT's shared head names its prototypes twice; ours once."""
    pairs = [(f"last_layer2.{leaf}", f"last_layer.{leaf}") for leaf in ("weight_g", "weight_v")]
    if all(a in head and head[a].equal(head[b]) for a, b in pairs):
        return {name: tensor for name, tensor in head.items() if not name.startswith("last_layer2.")}
    return head

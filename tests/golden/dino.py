"""Runs Fovea on the golden cases of DINO: the backbone, the head, the schedules."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.core.schedule import cosine, teacher_temp, warmup_cosine
from pretrain.models.backbones.vit import ViT
from pretrain.models.heads.projection import DINOHead
from tests.golden.case import Case, key_third


def build_vit(case: Case) -> ViT:
    """The official backbone: learned positions, resampled by scale factor."""
    known = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    known += ("qk_scale", "init_values")  # LayerScale is iBOT's
    neutral = {"drop_rate": 0, "attn_drop_rate": 0, "drop_path_rate": 0, "num_classes": 0}
    ctor = case.take("ctor", *known, neutral=neutral)
    side = ctor["img_size"]
    side = side[0] if isinstance(side, list) else side
    return ViT(
        (side, side),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor["embed_dim"],
        ctor["depth"],
        ctor["num_heads"],
        ctor.get("mlp_ratio", 4.0),
        pos_embed="learned",
        pos_resize="dino",
        qkv_bias=ctor.get("qkv_bias", True),
        qk_scale=ctor.get("qk_scale") or None,
        layer_scale=ctor.get("init_values") or None,
    )


def run_vit(case: Case) -> None:
    vit = build_vit(case).eval()
    vit.load_state_dict(case.below("state"))
    for name, images in case.below("input").items():
        patch = vit.patch_size
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        with torch.no_grad():
            case.check(f"expect/{name}/forward", vit.forward_cls(images))
            case.check(f"expect/{name}/forward", vit(images)[:, 0])
            case.check(f"expect/{name}/prepare_tokens", vit.prepare_tokens(images))
            case.check(f"expect/{name}/last_selfattention", vit.last_attention(images))
            case.check(f"expect/{name}/pos_encoding", vit.position_table(grid))
            for key in case.below(f"expect/{name}"):
                if key.startswith("intermediate"):
                    i, n = (int(number) for number in key.removeprefix("intermediate").split("_of_last"))
                    case.check(f"expect/{name}/{key}", vit.intermediate(images, n)[i])
    descriptions = {case.facts["tensors"][f"grad/{name}"]["what"] for name in case.below("grad")}
    sources = {re.findall(r"sum\(forward\((\w+)\)\^2\)", text)[0] for text in descriptions}
    for source in sources:
        vit.forward_cls(case[f"input/{source}"]).square().sum().backward()
    parameters = dict(vit.named_parameters())
    for name, expect in case.below("grad").items():
        gradient = parameters[name].grad
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient, zero=key_third(name, expect))


def run_head(case: Case) -> None:
    known = ("in_dim", "out_dim", "use_bn", "norm_last_layer", "nlayers", "hidden_dim", "bottleneck_dim")
    ctor = case.take("ctor", *known)
    head = DINOHead(**{**ctor, "nlayers": max(ctor.get("nlayers", 3), 1)}).train()
    head.load_state_dict(case.below("state"))
    x = case["input/x"].clone().requires_grad_()
    y = head(x)
    y.backward(case["input/dy"])
    assert x.grad is not None
    case.check("expect/y", y)
    case.check("expect/dx", x.grad)
    case.check("expect/trainable_weight_g", torch.tensor([head.last_layer.weight_g.requires_grad]))
    case.check_statistics(head.state_dict())
    parameters = dict(head.named_parameters())
    for name, expect in case.below("grad").items():
        gradient = parameters[name].grad
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient, zero=before_batch_norm(head, name, expect))
    if "expect/y_eval" in case.due:
        case.check("expect/y_eval", head.eval()(x))


def before_batch_norm(head: DINOHead, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """Marks a bias of the head that BatchNorm takes away again, so that its gradient is zero. None for other names."""
    if not (name.endswith(".bias") and isinstance(head.mlp, torch.nn.Sequential)):
        return None
    index = name.removeprefix("mlp.").removesuffix(".bias")
    follower = head.mlp[int(index) + 1] if index.isdigit() and int(index) + 1 < len(head.mlp) else None
    return torch.ones_like(tensor, dtype=torch.bool) if isinstance(follower, _BatchNorm) else None


def run_schedules(case: Case) -> None:
    for i, spec in enumerate(case.config["s"]):
        known = {"base_value", "final_value", "epochs", "niter_per_ep", "warmup_epochs", "start_warmup_value"}
        unknown = set(spec) - known
        assert not unknown, f"{case.name}: schedule options the runner does not know: {sorted(unknown)}"
        per_epoch = spec["niter_per_ep"]
        total = spec["epochs"] * per_epoch
        values = [
            warmup_cosine(
                step,
                peak=spec["base_value"],
                final=spec["final_value"],
                warmup_steps=spec.get("warmup_epochs", 0) * per_epoch,
                total_steps=total,
                warmup_form="closed",
                start=spec.get("start_warmup_value", 0.0),
            )
            for step in range(total)
        ]
        case.check(f"expect/schedule{i}", torch.tensor(values, dtype=torch.float64))
        if not spec.get("warmup_epochs", 0):
            plain = [cosine(step, spec["base_value"], spec["final_value"], total) for step in range(total)]
            case.check(f"expect/schedule{i}", torch.tensor(plain, dtype=torch.float64))
    for i, spec in enumerate(case.config["temps"]):
        case.check(f"expect/teacher_temp{i}", temperatures(spec, epochs=spec["nepochs"]))


def temperatures(spec: dict[str, Any], *, epochs: int) -> torch.Tensor:
    """The teacher's temperature in every epoch, float64."""
    values = [
        teacher_temp(
            epoch,
            warmup_temp=spec["warmup_teacher_temp"],
            temp=spec["teacher_temp"],
            warmup_epochs=spec["warmup_teacher_temp_epochs"],
        )
        for epoch in range(epochs)
    ]
    return torch.tensor(values, dtype=torch.float64)

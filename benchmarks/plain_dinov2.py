"""A DINOv2 step written plainly from the paper (Oquab et al. 2023, section 4), the baseline of `benchmarks.step`.

As in the official code the heads see masked patches only; all their logits are computed, Sinkhorn-Knopp works on the
matrix of all of them, and every loss is a formula.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.plain import PlainHead, plain_ema, plain_tokens


def plain_sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Assignments [n, K] whose prototypes hold about the same mass."""
    q = (logits.float() / temp).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_koleo(features: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour."""
    x = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        dots = x @ x.T
        dots.fill_diagonal_(-1)
        nearest = dots.argmax(dim=1)
    return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()


class PlainDINOv2(nn.Module):
    """`forward` takes a batch of `pretrain.objectives.dinov2.DINOv2` and gives the loss, moving the centres; `follow`
    moves the teacher after the update. Without `patch_out_dim` patches share the head of the class token."""

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        out_dim: int,
        patch_out_dim: int | None,
        hidden_dim: int,
        bottleneck_dim: int,
        student_temp: float,
        teacher_temp: float,
        centering: str,
        koleo_weight: float,
    ):
        super().__init__()
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.centering, self.koleo_weight = centering, koleo_weight

        def branch(backbone: VisionTransformer) -> nn.ModuleDict:
            widths = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim}
            heads = {"dino_head": out_dim} | ({} if patch_out_dim is None else {"ibot_head": patch_out_dim})
            made = {name: PlainHead(backbone.embed_dim, prototypes, **widths) for name, prototypes in heads.items()}
            return nn.ModuleDict({"backbone": backbone, **made})

        self.student, self.teacher = branch(backbone), branch(copy.deepcopy(backbone)).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("patch_center", torch.zeros(1, patch_out_dim or out_dim))
        self.patch_head = "dino_head" if patch_out_dim is None else "ibot_head"

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        centers: Any = (self.center, self.patch_center)
        crops, mask = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("global", "mask"))
        images, local = len(batch["global"]), batch["local"].transpose(0, 1).flatten(0, 1)
        tokens = plain_tokens(self.student["backbone"], crops, mask=mask, mask_token=self.mask_token)
        cls = torch.cat([tokens[:, 0], plain_tokens(self.student["backbone"], local)[:, 0]])
        student_cls = self.student["dino_head"](cls).float() / self.student_temp
        student_patches = self.student[self.patch_head](tokens[:, 1:][mask]).float() / self.student_temp
        with torch.no_grad():
            seen = plain_tokens(self.teacher["backbone"], crops)
            teacher_cls = self.teacher["dino_head"](seen[:, 0]).float()
            teacher_patches = self.teacher[self.patch_head](seen[:, 1:][mask]).float()
            targets = self.assign(teacher_cls, centers[0]).split(images)
            patch_targets = self.assign(teacher_patches, centers[1])
        logs = F.log_softmax(student_cls, dim=-1).split(images)
        pairs = [-(q * s).sum(-1).mean() for i, q in enumerate(targets) for j, s in enumerate(logs) if i != j]
        per_patch = -(patch_targets * F.log_softmax(student_patches, dim=-1)).sum(-1)
        weights = (1 / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)[mask]
        koleo = torch.stack([plain_koleo(crop) for crop in tokens[:, 0].split(images)]).sum()
        return torch.stack(pairs).mean() + (per_patch * weights).sum() / len(mask) + self.koleo_weight * koleo

    def assign(self, logits: Tensor, center: Tensor) -> Tensor:
        """The teacher's targets; a centre moves after it was used."""
        if self.centering == "sinkhorn_knopp":
            return plain_sinkhorn(logits, self.teacher_temp)
        targets = F.softmax((logits - center) / self.teacher_temp, dim=-1)
        center.mul_(0.9).add_(logits.mean(0, keepdim=True), alpha=0.1)
        return targets

    def follow(self, momentum: float) -> None:
        """The teacher's average."""
        plain_ema(list(self.teacher.parameters()), list(self.student.parameters()), momentum)

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """The weights of `pretrain.objectives.dinov2.DINOv2` over a `pretrain.models.backbones.vit.ViT`."""
        self.load_state_dict({name.replace("teacher.average.", "teacher."): value for name, value in state.items()})

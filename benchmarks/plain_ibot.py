"""An iBOT step written plainly from the paper (Zhou et al. 2022, section 3), the baseline of `benchmarks.step`.

Every choice is the obvious one, and the official code's: the heads see all tokens of student and teacher, all logits
are computed, and the mask is applied when the cross-entropies of the patches are summed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.plain import PlainHead, plain_ema, plain_tokens


class PlainIBOTHead(PlainHead):
    """Tokens [b, 1 + N, D] -> logits of the class token [b, K] and of the patches [b, N, K']."""

    def __init__(self, in_dim: int, out_dim: int, *, patch_out_dim: int, shared: bool, **widths: int):
        super().__init__(in_dim, out_dim, **widths)
        prototypes = nn.Linear(widths["bottleneck_dim"], patch_out_dim, bias=False)
        self.last_layer2 = self.last_layer if shared else nn.utils.weight_norm(prototypes)

    def forward(self, x: Tensor) -> Any:
        x = F.normalize(self.mlp(x), dim=-1)
        return self.last_layer(x[:, 0]), self.last_layer2(x[:, 1:])


class PlainIBOT(nn.Module):
    """`forward` takes a batch of `pretrain.objectives.ibot.IBOT` and gives the loss, moving the centres; `follow` moves
    the teacher after the update."""

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        out_dim: int,
        patch_out_dim: int,
        shared_head: bool,
        shared_head_teacher: bool,
        hidden_dim: int,
        bottleneck_dim: int,
        student_temp: float,
        teacher_temp: float,
        teacher_patch_temp: float,
    ):
        super().__init__()
        self.temps = student_temp, teacher_temp, teacher_patch_temp
        sizes = {"patch_out_dim": patch_out_dim, "hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim}
        heads = [
            PlainIBOTHead(backbone.embed_dim, out_dim, shared=shared, **sizes)
            for shared in (shared_head, shared_head_teacher)
        ]
        self.student = nn.ModuleDict({"backbone": backbone, "head": heads[0]})
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": heads[1]}).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("patch_center", torch.zeros(1, patch_out_dim))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        crops, mask = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("global", "mask"))
        tokens = plain_tokens(self.student["backbone"], crops, mask=mask, mask_token=self.mask_token)
        student_cls, student_patches = self.student["head"](tokens)
        if "local" in batch:
            local = batch["local"].transpose(0, 1).flatten(0, 1)
            student_cls = torch.cat(
                [student_cls, self.student["head"](plain_tokens(self.student["backbone"], local))[0]]
            )
        with torch.no_grad():
            teacher_cls, teacher_patches = self.teacher["head"](plain_tokens(self.teacher["backbone"], crops))
        loss = self.loss(student_cls, student_patches, teacher_cls, teacher_patches, mask, len(batch["global"]))
        centers: Any = (self.center, self.patch_center)
        centers[0].mul_(0.9).add_(teacher_cls.float().mean(0, keepdim=True), alpha=0.1)
        centers[1].mul_(0.9).add_(teacher_patches.float().mean((0, 1))[None], alpha=0.1)
        return loss

    def loss(
        self,
        student_cls: Tensor,
        student_patches: Tensor,
        teacher_cls: Tensor,
        teacher_patches: Tensor,
        mask: Tensor,
        images: int,
    ) -> Tensor:
        student_temp, temp, patch_temp = self.temps
        center: Any = self.center
        patch_center: Any = self.patch_center
        targets = F.softmax((teacher_cls.float() - center) / temp, dim=-1).split(images)
        logs = F.log_softmax(student_cls.float() / student_temp, dim=-1).split(images)
        pairs = [-(q * s).sum(-1).mean() for i, q in enumerate(targets) for j, s in enumerate(logs) if i != j]
        patch_targets = F.softmax((teacher_patches.float() - patch_center) / patch_temp, dim=-1)
        patch_logs = F.log_softmax(student_patches.float() / student_temp, dim=-1)
        per_crop = (-(patch_targets * patch_logs).sum(-1) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        return torch.stack(pairs).mean() + per_crop.mean()

    def follow(self, momentum: float) -> None:
        """The teacher's average, by the names that both have."""
        student = dict(self.student.named_parameters())
        common = [(value, student[name]) for name, value in self.teacher.named_parameters() if name in student]
        plain_ema([value for value, _ in common], [value for _, value in common], momentum)

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """The weights of `pretrain.objectives.ibot.IBOT` over a `pretrain.models.backbones.vit.ViT`."""
        state = {name.replace("teacher.average.", "teacher."): value for name, value in state.items()}
        for branch in ("student", "teacher"):
            for leaf in ("weight_g", "weight_v"):
                first, second = (f"{branch}.head.{layer}.{leaf}" for layer in ("last_layer", "last_layer2"))
                state.setdefault(second, state[first])
        self.load_state_dict(state)

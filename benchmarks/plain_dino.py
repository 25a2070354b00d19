"""A DINO step written plainly from the paper (Caron et al. 2021, algorithm 1), the baseline of `benchmarks.step`."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.plain import PlainBranch, PlainHead, plain_ema


class PlainDINO(nn.Module):
    """`forward` takes a batch of `pretrain.objectives.dino.DINO` and gives the loss, moving the centre; `follow` moves
    the teacher after the update."""

    def __init__(
        self, backbone: VisionTransformer, *, out_dim: int, hidden_dim: int, bottleneck_dim: int,
        student_temp: float = 0.1, teacher_temp: float = 0.04,
    ):  # fmt: skip
        super().__init__()
        student, teacher = (
            PlainHead(backbone.embed_dim, out_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
            for _ in range(2)
        )
        student.last_layer.weight_g.requires_grad_(False)
        self.student = PlainBranch(backbone, student)
        self.teacher = PlainBranch(copy.deepcopy(backbone), teacher).requires_grad_(False)
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        crops = [batch[name].transpose(0, 1).flatten(0, 1) for name in ("global", "local")]
        images = len(batch["global"])
        with torch.no_grad():
            target = self.teacher(crops[0]).float()
        value = plain_dino_loss(
            self.student(*crops).float(),
            target,
            self.center,  # pyright: ignore[reportArgumentType]
            images=images,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
        )
        with torch.no_grad():
            self.center.mul_(0.9).add_(target.mean(0, keepdim=True), alpha=0.1)  # pyright: ignore[reportCallIssue]
        return value

    def follow(self, momentum: float) -> None:
        """The teacher's average."""
        plain_ema(list(self.teacher.parameters()), list(self.student.parameters()), momentum)

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """The weights of `pretrain.objectives.dino.DINO` over a `pretrain.models.backbones.vit.ViT`."""
        self.load_state_dict({name.replace("teacher.average.", "teacher."): value for name, value in state.items()})


def plain_dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, *, images: int, student_temp: float, teacher_temp: float
) -> Tensor:
    """Cross-entropy of every student crop against every other global crop."""
    terms = []
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1).detach().split(images)
    for i, target in enumerate(targets):
        for j, logits in enumerate((student / student_temp).split(images)):
            if i != j:
                terms.append((-target * F.log_softmax(logits, dim=-1)).sum(-1).mean())
    return torch.stack(terms).mean()

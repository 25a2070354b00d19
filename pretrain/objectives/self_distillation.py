"""Base class of DINO, iBOT and DINOv2: a student of all crops, and its EMA teacher, which sees the global ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pretrain.core.schedule import cosine
from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.pictures import drawing
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, pooled
from pretrain.objectives.configs.self_distillation import SelfDistillationConfig
from pretrain.objectives.multi_crop import MultiCrop


class Branch(nn.Module):
    """A backbone and the heads that a subclass adds: the class of student and teacher."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def encode(
        self,
        images: Tensor,
        *,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        own: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] -> features [b, D], patches [b, N, D].

        Args:
            drop: uniform random numbers of the drop path [b, depth, 2]. mask: bool [b, N], True where a patch is
                replaced by `mask_token` [1, 1, D]. own: further arguments of the backbone, which a ViT of ours has.
        """
        tokens = self.backbone(images, drop=drop, mask=mask, mask_token=mask_token, **own)
        return pooled(self.backbone, tokens), tokens[:, self.backbone.num_prefix_tokens :]

    def encode_crops(
        self,
        crops: list[Tensor],
        *,
        drop: Tensor | None,
        mask: Tensor | None,
        mask_token: Tensor | None,
        own: Sequence[Mapping[str, Any]] = ({}, {}),
    ) -> tuple[Tensor, Tensor]:
        """Features [crops * b, D] of the masked global and the local crops; all patches of the former [2b, N, D].

        Args:
            crops: as `MultiCrop.crops` returns them. drop: [crops * b, depth, 2]. mask: bool [2b, N].
            own: further arguments of the backbone's `forward` for global crops, of its `forward_cls` for local ones.
        """
        drops = (None, None) if drop is None else drop.tensor_split([len(crops[0])])
        features, patches = self.encode(crops[0], drop=drops[0], mask=mask, mask_token=mask_token, own=own[0])
        local = [self.backbone.forward_cls(crops[1], drop=drops[1], **own[1])] if len(crops) > 1 else []
        return torch.cat([features, *local]), patches


BranchT = TypeVar("BranchT", bound=Branch)
SettingsT = TypeVar("SettingsT", bound=SelfDistillationConfig, covariant=True)


class SelfDistillation(MultiCrop[SettingsT], Generic[SettingsT, BranchT]):
    """The batch of `MultiCrop`. A subclass sets `student` (parameters; `student.backbone` is the encoder) and `teacher`
    (buffers).
    """

    backbone_prefixes = ("teacher.average.backbone.", "student.backbone.")
    horizon: Horizon
    student: BranchT
    teacher: EMA[BranchT]

    @property
    def backbone(self) -> Backbone:
        """The teacher's backbone: the better encoder of the two."""
        return self.teacher.average.backbone

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.student)]

    def momentum(self, step: int) -> float:
        """EMA momentum of the update after `step` completed steps."""
        first, last = self.config.momentum_teacher, self.config.final_momentum_teacher
        return cosine(step, first, last, self.horizon.total_steps)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.teacher.update(self.student, self.momentum(step - 1))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """The crops of the first images, and the attention of the teacher's class token, per head."""
        shown = super().pictures(batch, step, mean=mean, std=std)
        images, backbone = batch["global"][:4, 0], self.backbone
        attention = backbone.last_attention(images) if backbone.class_token else None
        if attention is not None:
            of_class_token = attention[:, :, 0, backbone.num_prefix_tokens :]
            maps = of_class_token.reshape(*of_class_token.shape[:2], images.shape[2] // backbone.patch_size, -1)
            rgb = drawing.to_rgb(images, mean=mean, std=std)[:, None]
            heat = drawing.heat(maps, (images.shape[2], images.shape[3]))
            shown["attention of the teacher"] = drawing.sheet(torch.cat([rgb, drawing.overlay(rgb, heat)], dim=1))
        return shown

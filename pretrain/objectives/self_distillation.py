"""What DINO, iBOT and DINOv2 share: a student with crops of two sizes, its average as teacher, how both are shown."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pretrain.core.schedule import cosine
from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.pictures import drawing
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, Objective, pooled
from pretrain.objectives.configs.self_distillation import SelfDistillationConfig


class Branch(nn.Module):
    """The backbone and the heads that a subclass adds: student and teacher are one each."""

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
    ) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] -> features [b, D], patches [b, N, D].

        Args:
            drop: uniform random numbers of the drop path [b, depth, 2]. mask: bool [b, N], True where a patch is
                replaced by `mask_token` [1, 1, D].
        """
        tokens = self.backbone(images, drop=drop, mask=mask, mask_token=mask_token)
        return pooled(self.backbone, tokens), tokens[:, self.backbone.num_prefix_tokens :]

    def encode_crops(
        self, crops: list[Tensor], *, drop: Tensor | None, mask: Tensor, mask_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features [crops * b, D] of the masked global and the local crops; all patches of the former [2b, N, D].

        Args:
            crops: as `SelfDistillation.crops` returns them. drop: [crops * b, depth, 2]. mask: bool [2b, N].
        """
        drops = (None, None) if drop is None else drop.tensor_split([len(crops[0])])
        features, patches = self.encode(crops[0], drop=drops[0], mask=mask, mask_token=mask_token)
        local = [self.backbone.forward_cls(crops[1], drop=drops[1])] if len(crops) > 1 else []
        return torch.cat([features, *local]), patches


BranchT = TypeVar("BranchT", bound=Branch)
SettingsT = TypeVar("SettingsT", bound=SelfDistillationConfig, covariant=True)


class SelfDistillation(Objective[SettingsT], Generic[SettingsT, BranchT]):
    """Batch: "global" [b, 2, C, H, W], with local crops "local" [b, n, C, h, w], with drop path its uniforms
    "drop_path" [b, 2 + n, depth, 2].

    A subclass sets `student` (parameters; `student.backbone` is the encoder) and `teacher` (buffers).
    """

    backbone_prefixes = ("teacher.average.backbone.", "student.backbone.")
    horizon: Horizon
    student: BranchT
    teacher: EMA[BranchT]

    @property
    def backbone(self) -> Backbone:
        """The teacher's backbone: its average is the better encoder of the two."""
        return self.teacher.average.backbone

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.student)]

    def crops(self, batch: Batch) -> list[Tensor]:
        """One tensor per resolution, crop after crop: [2 * b, C, H, W] and, if any, [n * b, C, h, w]."""
        expected = {"global": 2, "local": self.config.local_crops_number}
        for name, count in expected.items():
            found = batch[name].shape[1] if name in batch else 0
            if found != count:
                raise ValueError(f"batch[{name!r}] holds {found} crops per image, the objective needs {count}")
        return [crop_after_crop(batch[name]) for name, count in expected.items() if count]

    def drop_path(self, batch: Batch) -> Tensor | None:
        """Uniform random numbers of the student's drop path, crop after crop: [crops * b, depth, 2]."""
        return crop_after_crop(batch["drop_path"]) if "drop_path" in batch else None

    def momentum(self, step: int) -> float:
        """Momentum of the average after the update that follows `step` completed steps."""
        first, last = self.config.momentum_teacher, self.config.final_momentum_teacher
        return cosine(step, first, last, self.horizon.total_steps)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.teacher.update(self.student, self.momentum(step - 1))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """The crops of the first images, and where the teacher's class token looks, head by head."""
        crops = {name: batch[name][:4] for name in ("global", "local") if name in batch}
        shown = {f"{name} crops": _sheet(views, mean=mean, std=std) for name, views in crops.items()}
        images, backbone = crops["global"][:, 0], self.backbone
        attention = backbone.last_attention(images) if backbone.class_token else None
        if attention is not None:
            looked_at = attention[:, :, 0, backbone.num_prefix_tokens :]
            maps = looked_at.unflatten(2, (images.shape[2] // backbone.patch_size, -1))
            rgb = drawing.to_rgb(images, mean=mean, std=std)[:, None]
            heat = drawing.heat(maps, (images.shape[2], images.shape[3]))
            shown["attention of the teacher"] = drawing.sheet(torch.cat([rgb, drawing.overlay(rgb, heat)], dim=1))
        return shown


def crop_after_crop(per_image: Tensor) -> Tensor:
    """[b, crops, ...] -> [crops * b, ...]: all images of the first crop, then of the second."""
    return per_image.transpose(0, 1).flatten(0, 1)


def _sheet(views: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    rgb = drawing.to_rgb(views.flatten(0, 1), mean=mean, std=std)
    return drawing.sheet(rgb.unflatten(0, views.shape[:2]))

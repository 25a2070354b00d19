"""Self-distillation without labels: a student matches, from any crop, what its own average says of the large ones.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import distributed
from pretrain.models import param_groups, pictures
from pretrain.models.ema import EMA
from pretrain.models.heads import DINOHead
from pretrain.models.prototype_loss import prototype_loss
from pretrain.models.sync_batch_norm import synchronized
from pretrain.models.vit import ViT
from pretrain.objectives.base import Horizon, Objective, feature_std, with_prefix
from pretrain.objectives.configs import DINOConfig
from pretrain.schedule import cosine, teacher_temp


class Branch(nn.Module):
    """Backbone and head: what student and teacher both are."""

    def __init__(self, backbone: ViT, head: DINOHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def encode(self, *resolutions: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Crops [n_i, C, h_i, w_i], one pass per resolution -> class tokens [sum n_i, D], bottlenecks [sum n_i, B].

        `drop` [sum n_i, depth, 2] are the uniforms of the drop path.
        """
        sizes = [len(crops) for crops in resolutions]
        drops = [None] * len(sizes) if drop is None else drop.split(sizes)
        features = torch.cat([self.backbone.forward_cls(*given) for given in zip(resolutions, drops, strict=True)])
        return features, self.head.bottleneck(features)

    def forward(self, *resolutions: Tensor) -> Tensor:
        """Crops -> logits [sum n_i, K]."""
        return self.head.last_layer(self.encode(*resolutions)[1])


class DINO(Objective):
    """Batch: "global" [b, 2, C, H, W], with local crops "local" [b, n, C, h, w], with drop path its uniforms
    "drop_path" [b, 2 + n, depth, 2].

    State: `student` (parameters), `teacher` and `center` (buffers). The centre of a step's logits is summed over its
    micro-batches and ranks in `after_step`; until then it is pending, and a skipped step leaves no trace.
    """

    head_prefixes = ("student.head.", "teacher.average.head.", "center")
    center: Tensor

    def __init__(self, config: DINOConfig, backbone: ViT, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        head = DINOHead(
            backbone.embed_dim,
            config.out_dim,
            nlayers=config.head_nlayers,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            use_bn=config.use_bn_in_head,
            norm_last_layer=config.norm_last_layer,
        )
        backbone.pos_resize = config.pos_resize
        backbone.set_drop_path(config.drop_path_rate)
        student = Branch(backbone, synchronized(head))
        self.student = student
        self.teacher: EMA[Branch] = EMA(student)
        self.teacher.average.backbone.set_drop_path(0.0)
        self.register_buffer("center", torch.zeros(1, config.out_dim))
        self._pending: tuple[Tensor, int] | None = None

    @property
    def backbone(self) -> ViT:
        """The teacher's backbone: its average is the better encoder of the two."""
        return self.teacher.average.backbone

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.student)]

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        crops = self.crops(batch)
        images = len(batch["global"])
        # [b, crops, depth, 2], like the crops: crop after crop.
        drop = batch["drop_path"].transpose(0, 1).flatten(0, 1) if "drop_path" in batch else None
        features, student = self.student.encode(*crops, drop=drop)
        with torch.no_grad():
            _, teacher = self.teacher.average.encode(crops[0])
        result = prototype_loss(
            student.unflatten(0, (-1, images)),
            self.student.head.last_layer,
            teacher.unflatten(0, (-1, images)),
            self.teacher.average.head.last_layer,
            self.center[0],
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(step),
        )
        if self.training:
            self._remember(result.teacher_sum, rows=len(teacher))
        return {
            "loss": result.loss,
            "teacher_entropy": result.teacher_entropy,
            "teacher_kl_uniform": math.log(self.config.out_dim) - result.mean_entropy,
            "feature_std": feature_std(features[: len(teacher)]),
        }

    def crops(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """One tensor per resolution, crop after crop: [2 * b, C, H, W] and, if any, [n * b, C, h, w]."""
        expected = {"global": 2, "local": self.config.local_crops_number}
        for name, count in expected.items():
            found = batch[name].shape[1] if name in batch else 0
            if found != count:
                raise ValueError(f"batch[{name!r}] holds {found} crops per image, the objective needs {count}")
        return [batch[name].transpose(0, 1).flatten(0, 1) for name, count in expected.items() if count]

    def teacher_temp(self, step: int) -> float:
        """Temperature of the teacher's softmax in the epoch of `step`."""
        return teacher_temp(
            self.horizon.epoch(step),
            warmup_temp=self.config.warmup_teacher_temp,
            temp=self.config.teacher_temp,
            warmup_epochs=self.config.warmup_teacher_temp_epochs,
        )

    def momentum(self, step: int) -> float:
        """Momentum of the average after the update that follows `step` completed steps."""
        return cosine(step, self.config.momentum_teacher, 1.0, self.horizon.total_steps)

    def after_step(self, step: int) -> None:
        self.teacher.update(self.student, self.momentum(step - 1))
        if self._pending is not None:
            total, rows = self._pending
            self._pending = None
            total = distributed.all_reduce_sum(torch.cat([total, total.new_tensor([rows])]))
            self.center.lerp_(total[None, :-1] / total[-1], 1.0 - self.config.center_momentum)

    def discard_pending(self) -> None:
        self._pending = None

    def param_groups(self) -> list[dict[str, Any]]:
        frozen = self.config.freeze_last_layer_epochs * self.horizon.steps_per_epoch
        return param_groups.take(
            param_groups.split(self), "student.head.last_layer.", into="last_layer", frozen_steps=frozen
        )

    def place_backbone(self, backbone: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_prefix("student.backbone", backbone) | with_prefix("teacher.average.backbone", backbone)

    def heads_state(self) -> dict[str, Tensor]:
        """The student, the teacher's head and the centre."""
        backbone = "teacher.average.backbone."
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(backbone)}

    @torch.no_grad()
    def pictures(
        self, batch: dict[str, Tensor], step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """The crops of the first images, and where the teacher's class token looks, head by head."""
        crops = {name: batch[name][:4] for name in ("global", "local") if name in batch}
        shown = {f"{name} crops": self._sheet(views, mean=mean, std=std) for name, views in crops.items()}
        images = crops["global"][:, 0]
        attention = self.teacher.average.backbone.last_attention(images)[:, :, 0, self.backbone.num_prefix_tokens :]
        patch = self.backbone.patch_size
        maps = attention.unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))
        rgb = pictures.to_rgb(images, mean=mean, std=std)[:, None]
        heat = pictures.heat(maps, (images.shape[2], images.shape[3]))
        shown["attention of the teacher"] = pictures.sheet(torch.cat([rgb, pictures.overlay(rgb, heat)], dim=1))
        return shown

    def _sheet(self, views: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        rgb = pictures.to_rgb(views.flatten(0, 1), mean=mean, std=std)
        return pictures.sheet(rgb.unflatten(0, views.shape[:2]))

    def _remember(self, teacher_sum: Tensor, *, rows: int) -> None:
        if self._pending is not None:
            teacher_sum, rows = self._pending[0] + teacher_sum, self._pending[1] + rows
        self._pending = (teacher_sum, rows)

"""Self-distillation without labels: from any crop, a student predicts the output of its EMA teacher for large crops.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.core.schedule import teacher_temp
from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.projection import DINOHead
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.losses.center import PendingMean, center_norm
from pretrain.models.losses.prototype_loss import prototype_loss
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, feature_std
from pretrain.objectives.configs.dino import DINOConfig
from pretrain.objectives.multi_crop import by_crop
from pretrain.objectives.self_distillation import Branch, SelfDistillation


class DINOBranch(Branch):
    """Backbone and head."""

    def __init__(self, backbone: Backbone, head: DINOHead):
        super().__init__(backbone)
        self.head = head

    def project(self, *resolutions: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Crops [n_i, C, h_i, w_i], one pass per resolution -> class tokens [sum n_i, D], bottlenecks [sum n_i, B].

        `drop` [sum n_i, depth, 2] are the uniform random numbers of the drop path.
        """
        sizes = [len(crops) for crops in resolutions]
        drops = [None] * len(sizes) if drop is None else torch.split(drop, sizes)
        features = torch.cat([self.backbone.forward_cls(*given) for given in zip(resolutions, drops, strict=True)])
        return features, self.head.bottleneck(features)

    def forward(self, *resolutions: Tensor) -> Tensor:
        """Crops -> logits [sum n_i, K]."""
        return self.head.last_layer(self.project(*resolutions)[1])


class DINO(SelfDistillation[DINOConfig, DINOBranch]):
    """State: `student`, `teacher` and `center` (a buffer). The centre is updated in `after_step` from the
    logits of all micro-batches and ranks of the step; a skipped step does not change it.
    """

    head_prefixes = ("student.head.", "teacher.average.head.", "center")
    center: Tensor

    def __init__(self, config: DINOConfig, backbone: Backbone, horizon: Horizon):
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
        student = DINOBranch(backbone, head)
        self.student = synchronized(student) if config.sync_bn else student
        self.teacher = EMA(self.student)
        self.teacher.average.backbone.set_drop_path(0.0)
        self.register_buffer("center", torch.zeros(1, config.out_dim))
        self._pending = PendingMean()

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        crops = self.crops(batch)
        images = len(batch["global"])
        features, student = self.student.project(*crops, drop=self.drop_path(batch))
        with torch.no_grad():
            teacher_features, teacher = self.teacher.average.project(crops[0])
        result = prototype_loss(
            by_crop(student, images),
            self.student.head.last_layer,
            by_crop(teacher, images),
            self.teacher.average.head.last_layer,
            self.center[0],
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(step),
        )
        if self.training:
            self._pending.add(result.teacher_sum, rows=len(teacher))
        seen_by_both = features[: len(teacher)].detach()
        return {
            "loss": result.loss,
            "teacher_entropy": result.teacher_entropy,
            "teacher_kl_uniform": math.log(self.config.out_dim) - result.mean_entropy,
            "feature_std": feature_std(seen_by_both),
            "student_teacher_cosine": F.cosine_similarity(seen_by_both.float(), teacher_features.float()).mean(),
            "center_norm": center_norm(self.center),
        }

    def teacher_temp(self, step: int) -> float:
        """Temperature of the teacher's softmax in the epoch of `step`."""
        return teacher_temp(
            self.horizon.epoch(step),
            warmup_temp=self.config.warmup_teacher_temp,
            temp=self.config.teacher_temp,
            warmup_epochs=self.config.warmup_teacher_temp_epochs,
        )

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._pending.move(self.center, self.config.center_momentum)

    def discard_pending(self) -> None:
        super().discard_pending()
        self._pending.discard()

    def param_groups(self) -> list[ParamGroup]:
        frozen = self.config.freeze_last_layer_epochs * self.horizon.steps_per_epoch
        return param_groups.take(
            param_groups.split(self), "student.head.last_layer.", into="last_layer", frozen_steps=frozen
        )

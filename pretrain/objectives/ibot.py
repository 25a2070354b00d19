"""Self-distillation of images and of their masked patches: the teacher is an online tokenizer.

Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.schedule import teacher_temp
from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.projection import IBOTHead
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.losses.center import PendingMean, center_norm
from pretrain.models.losses.patch_loss import mask_weights, patch_loss
from pretrain.models.losses.prototype_loss import prototype_loss
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, feature_std
from pretrain.objectives.configs.ibot import IBOTConfig
from pretrain.objectives.multi_crop import by_crop, crop_after_crop
from pretrain.objectives.self_distillation import Branch, SelfDistillation


class IBOTBranch(Branch):
    """Backbone and head."""

    def __init__(self, backbone: Backbone, head: IBOTHead):
        super().__init__(backbone)
        self.head = head

    def bottlenecks(self, features: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Those of features [n, D] -> [n, B] and of all their patches [n, N, D] -> [n * N, B], in one pass of all
        tokens, as in the official code: batch norms depend on it.
        """
        tokens = torch.cat([features[:, None], patches], dim=1)
        rows = self.head.bottleneck(tokens.flatten(0, 1))
        result = rows.view(*tokens.shape[:2], rows.shape[-1])
        return result[:, 0], result[:, 1:].flatten(0, 1)


class IBOT(SelfDistillation[IBOTConfig, IBOTBranch]):
    """Batch: that of `MultiCrop`, and "mask" bool [b, 2, N]: True where the student does not see a patch.

    State: `student`, `mask_token`, `teacher`, and the buffers `center` and `patch_center`, which a skipped step does
    not change. The patches' centre is a mean over all patches, masked or not, so the teacher's MLP reads all of them;
    logits per patch are computed for masked patches only.

    As in the official code, a teacher with a shared head starts from the patch prototypes if the student has its own.
    """

    head_prefixes = ("student.head.", "teacher.average.head.", "center", "patch_center", "mask_token")
    center: Tensor
    patch_center: Tensor

    def __init__(self, config: IBOTConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        head = IBOTHead(
            backbone.embed_dim,
            config.out_dim,
            patch_out_dim=config.patch_out_dim,
            shared=config.shared_head,
            nlayers=config.head_nlayers,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            norm=config.head_norm,
            act=config.head_act,
            norm_last_layer=config.norm_last_layer,
        )
        backbone.pos_resize = config.pos_resize
        backbone.set_drop_path(config.drop_path_rate)
        student = IBOTBranch(backbone, head)
        self.student = synchronized(student) if config.sync_bn else student
        self.mask_token = None
        if config.use_masked_im_modeling:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.mask_dim))
        teacher = IBOTBranch(backbone, head.for_teacher(shared=config.shared_head_teacher))
        self.teacher = EMA(teacher, follows=self.student)
        self.teacher.average.backbone.set_drop_path(0.0)
        self.register_buffer("center", torch.zeros(1, config.out_dim))
        self.register_buffer("patch_center", torch.zeros(1, config.patch_out_dim))
        self._pending, self._pending_patches = PendingMean(), PendingMean()

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        crops, mask = self.crops(batch), crop_after_crop(batch["mask"])
        images, config = len(batch["global"]), self.config
        student, teacher = self.student, self.teacher.average
        features, cls, patches = self._student_bottlenecks(crops, mask, self.drop_path(batch))
        with torch.no_grad():
            teacher_features, teacher_patches = teacher.encode(crops[0])
            if teacher.head.couples_rows:
                teacher_cls, teacher_bottlenecks = teacher.bottlenecks(teacher_features, teacher_patches)
            else:
                teacher_cls = teacher.head.bottleneck(teacher_features)
                teacher_bottlenecks = teacher.head.bottleneck(teacher_patches.flatten(0, 1))
        result = prototype_loss(
            by_crop(cls, images),
            student.head.last_layer,
            by_crop(teacher_cls, images),
            teacher.head.last_layer,
            self.center[0],
            student_temp=config.student_temp,
            teacher_temp=self.teacher_temp(step),
        )
        of_patches = patch_loss(
            patches,
            student.head.patch_layer,
            teacher_bottlenecks[mask.flatten()],
            teacher.head.patch_layer,
            self.patch_center[0],
            mask_weights(mask) / len(mask),  # a crop without masked patches counts as 0
            student_temp=config.student_temp,
            teacher_temp=self.teacher_patch_temp(step),
        )
        if self.training:
            self._pending.add(result.teacher_sum, rows=len(teacher_cls))
            total = teacher.head.patch_layer.sum_of_logits(teacher_bottlenecks)
            self._pending_patches.add(total, rows=len(teacher_bottlenecks))
        seen_by_both = features[: len(teacher_features)].detach()
        return {
            "loss": config.lambda1 * result.loss + config.lambda2 * of_patches.loss,
            "loss_cls": config.lambda1 * result.loss.detach(),
            "loss_patch": config.lambda2 * of_patches.loss.detach(),
            "teacher_entropy": result.teacher_entropy,
            "teacher_kl_uniform": math.log(config.out_dim) - result.mean_entropy,
            "patch_entropy": of_patches.teacher_entropy,
            "feature_std": feature_std(seen_by_both),
            "student_teacher_cosine": F.cosine_similarity(seen_by_both.float(), teacher_features.float()).mean(),
            "center_norm": center_norm(self.center),
        }

    def _student_bottlenecks(
        self, crops: list[Tensor], mask: Tensor, drop: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features [crops * b, D], their bottlenecks, and those of the masked patches, in the order of `mask`."""
        student, seen = self.student, mask if self.config.use_masked_im_modeling else None
        if not student.head.couples_rows:
            features, of_global = student.encode_crops(crops, drop=drop, mask=seen, mask_token=self.mask_token)
            hidden = of_global[mask]
            together = student.head.bottleneck(torch.cat([features, hidden]))
            cls, patches = torch.split(together, [len(features), len(hidden)])
            return features, cls, patches
        drops: list[Tensor | None] = [None] * len(crops)
        if drop is not None:
            drops = list(torch.split(drop, [len(images) for images in crops]))
        tokens = [student.encode(crops[0], drop=drops[0], mask=seen, mask_token=self.mask_token)]
        tokens += [student.encode(images, drop=given) for images, given in zip(crops[1:], drops[1:], strict=True)]
        rows = [student.bottlenecks(*given) for given in tokens]
        features, cls = torch.cat([given[0] for given in tokens]), torch.cat([given[0] for given in rows])
        return features, cls, rows[0][1][mask.flatten()]

    def teacher_temp(self, step: int) -> float:
        """Temperature of the teacher's softmax over the class token's prototypes in the epoch of `step`."""
        return teacher_temp(
            self.horizon.epoch(step),
            warmup_temp=self.config.warmup_teacher_temp,
            temp=self.config.teacher_temp,
            warmup_epochs=self.config.warmup_teacher_temp_epochs,
        )

    def teacher_patch_temp(self, step: int) -> float:
        """The same for patches; its warm-up starts at the first epoch with masked patches."""
        return teacher_temp(
            max(0, self.horizon.epoch(step) - self.config.pred_start_epoch),
            warmup_temp=self.config.warmup_teacher_patch_temp,
            temp=self.config.teacher_patch_temp,
            warmup_epochs=self.config.warmup_teacher_temp_epochs,
        )

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._pending.move(self.center, self.config.center_momentum)
        self._pending_patches.move(self.patch_center, self.config.patch_center_momentum)

    def discard_pending(self) -> None:
        super().discard_pending()
        self._pending.discard()
        self._pending_patches.discard()

    def param_groups(self) -> list[ParamGroup]:
        """Both last layers are frozen in the first epochs, as in the official code, which selects them by name."""
        frozen = self.config.freeze_last_layer_epochs * self.horizon.steps_per_epoch
        return param_groups.take(
            param_groups.split(self), "student.head.last_layer", into="last_layer", frozen_steps=frozen
        )

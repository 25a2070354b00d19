"""Self-distillation of images and masked patches, with KoLeo regularization; optionally Gram anchoring.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", section 4; Siméoni et al. 2025,
"DINOv3", for the Gram teacher, moved coordinates, linear prototypes and weights that follow schedules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.schedule import PhasesConfig, teacher_temp
from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.heads.projection import DINOHead, Prototypes
from pretrain.models.layer_decay import layer_decay
from pretrain.models.layers.attention import new_norm
from pretrain.models.layers.rope import moved_axes
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.losses.center import PendingMean, center_norm
from pretrain.models.losses.koleo import koleo_loss
from pretrain.models.losses.patch_loss import PatchLoss, mask_weights, patch_loss
from pretrain.models.losses.prototype_loss import PrototypeLoss, prototype_loss
from pretrain.models.losses.sinkhorn import sinkhorn_center
from pretrain.models.teachers.ema import EMA
from pretrain.models.teachers.gram_teacher import GramTeacher, compared, gram_loss, gram_patches
from pretrain.objectives.base import Horizon, feature_std
from pretrain.objectives.configs.dinov2 import DINOv2Config
from pretrain.objectives.configs.gram import GramConfig
from pretrain.objectives.multi_crop import by_crop, crop_after_crop
from pretrain.objectives.self_distillation import Branch, SelfDistillation


class DINOv2Branch(Branch):
    """Backbone and heads. Without `ibot_head`, patches use `dino_head`. `local_norm`: the last norm of local crops."""

    def __init__(
        self, backbone: Backbone, dino_head: DINOHead, ibot_head: DINOHead | None, local_norm: nn.Module | None
    ):
        super().__init__(backbone)
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.local_norm = local_norm

    @property
    def patch_head(self) -> DINOHead:
        return self.dino_head if self.ibot_head is None else self.ibot_head

    def resolutions(self, axes: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the backbone takes with global and with local crops: `axes` [2, depth, 2, 2], and the local norm."""
        of_global, of_local = ({}, {}) if axes is None else ({"axes": axes[0]}, {"axes": axes[1]})
        return of_global, of_local if self.local_norm is None else {**of_local, "norm": self.local_norm}


def local_norm(backbone: Backbone) -> nn.Module:
    """A last norm like that of a ViT of ours."""
    assert isinstance(backbone, ViT), "DINOv2Config.problems refuses others"
    return new_norm(backbone.norm_layer, backbone.embed_dim, backbone.norm_eps)


class DINOv2(SelfDistillation[DINOv2Config, DINOv2Branch]):
    """Batch: that of `MultiCrop`, "mask" bool [b, 2, N] (True where the student does not see a patch), and if
    the Gram teacher has its own view of the global crops, "gram" [b, 2, C, H', W']; where coordinates are moved,
    "rope" [b, 2, depth, 5], uniform numbers that are the same for all images (`rope.moved_axes`).

    State: `student`, `mask_token`, `teacher`, the buffers `center` and `patch_center` (means over the inputs
    of the teacher's heads, so over masked patches only; Sinkhorn-Knopp does not change them), and `gram_teacher`.
    """

    head_prefixes = (
        *("student.dino_head.", "student.ibot_head.", "teacher.average.dino_head.", "teacher.average.ibot_head."),
        *("student.local_norm.", "teacher.average.local_norm.", "center", "patch_center", "mask_token"),
    )
    renewed_prefixes = ("gram_teacher.",)
    center: Tensor
    patch_center: Tensor

    def __init__(self, config: DINOv2Config, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        self._epoch_steps = config.epoch_steps or horizon.steps_per_epoch
        dino_head = DINOHead(
            backbone.embed_dim,
            config.out_dim,
            nlayers=config.head_nlayers,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            norm_last_layer=config.norm_last_layer,
            linear=config.prototypes == "linear",
        )
        ibot_head = None
        if config.separate_patch_head:
            ibot_head = DINOHead(
                backbone.embed_dim,
                config.patch_out_dim,
                nlayers=config.patch_nlayers,
                hidden_dim=config.patch_hidden_dim,
                bottleneck_dim=config.patch_bottleneck_dim,
                norm_last_layer=config.norm_last_layer,
                linear=config.prototypes == "linear",
            )
        backbone.initialize_tokens(config.token_std)
        backbone.pos_resize = config.pos_resize
        backbone.set_drop_path(config.drop_path_rate, uniform=config.drop_path_uniform, subset=config.drop_path_subset)
        student = DINOv2Branch(backbone, dino_head, ibot_head, local_norm(backbone) if config.local_norm else None)
        self.student = synchronized(student) if config.sync_bn else student
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.mask_dim))
        self.teacher = EMA(self.student)
        self.teacher.average.backbone.set_drop_path(0.0)
        keeps_one = config.gram is not None and config.gram.teacher == "earlier"
        self.gram_teacher = GramTeacher(self.teacher.average.backbone) if keeps_one else None
        self.register_buffer("center", torch.zeros(1, config.out_dim))
        patch_out_dim = config.patch_out_dim if ibot_head is not None else config.out_dim
        self.register_buffer("patch_center", torch.zeros(1, patch_out_dim))
        self._pending, self._pending_patches = PendingMean(), PendingMean()

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        crops, mask, config = self.crops(batch), crop_after_crop(batch["mask"]), self.config
        features, patches = self.student.encode_crops(
            crops,
            drop=self.drop_path(batch),
            mask=mask,
            mask_token=self.mask_token,
            own=self.student.resolutions(self._axes(batch)),
        )
        with torch.no_grad():
            teacher_features, teacher_patches = self.teacher.average.encode(crops[0])
        temp, images = self.teacher_temp(step), len(batch["global"])
        of_cls = self._cls_loss(features, teacher_features, temp, images, step)
        of_patches = self._patch_loss(patches[mask], teacher_patches[mask], mask, temp)
        both = features[: 2 * images]
        # The official code divides by 2 + max(2 n, 1) for n local crops: the number of pairs, except for n = 0.
        pairs = 2 + 2 * config.local_crops_number
        scale = pairs / max(pairs, 3)
        loss = config.dino_weight * (of_cls.loss * scale) + config.ibot_weight * of_patches.loss
        of_crops = of_cls.by_crop.detach() * scale
        # The log has the values of the official loss dictionary: KoLeo with its weight, the others without; patches and
        # KoLeo as the mean of the two global crops, of which the loss has the sum.
        result = {"loss_cls_global": of_crops[:2].sum(), "loss_patch": of_patches.loss.detach() / 2}
        if config.local_crops_number:
            result["loss_cls_local"] = of_crops[2:].sum()
        if config.koleo_weight:
            koleo = torch.stack([self._koleo(crop) for crop in both.chunk(2)]).sum()
            loss = loss + config.koleo_weight * koleo
            result["loss_koleo"] = config.koleo_weight * koleo.detach() / 2
        if config.gram is not None and step >= config.gram.start_step:
            seen = crop_after_crop(batch["gram"]) if "gram" in batch else crops[0]
            gram = self._gram_loss(config.gram, patches, seen, mask)
            weight = self._scheduled(config.gram.weight_schedule, step)
            loss = loss + (config.gram.weight if weight is None else weight) * gram
            result["loss_gram"] = gram.detach()
        if config.centering == "centering":
            result["center_norm"] = center_norm(self.center)
        both = both.detach()
        return {
            "loss": loss,
            **result,
            "teacher_entropy": of_cls.teacher_entropy,
            "teacher_kl_uniform": math.log(config.out_dim) - of_cls.mean_entropy,
            "patch_entropy": of_patches.teacher_entropy,
            "feature_std": feature_std(both),
            "student_teacher_cosine": F.cosine_similarity(both.float(), teacher_features.float()).mean(),
        }

    def _axes(self, batch: Batch) -> Tensor | None:
        """Offsets and factors of the coordinates [2, depth, 2, 2] of global and local crops."""
        if "rope" not in batch:
            return None
        config = self.config
        return moved_axes(
            batch["rope"][0], shift=config.rope_shift, jitter=config.rope_jitter, rescale=config.rope_rescale
        )

    def _scheduled(self, phases: PhasesConfig | None, step: int) -> float | None:
        """The value of a schedule; None: there is none."""
        if phases is None:
            return None
        return phases.at(step, epoch_steps=self._epoch_steps, total_steps=self.horizon.total_steps)

    def _cls_loss(
        self, features: Tensor, teacher_features: Tensor, temp: float, images: int, step: int
    ) -> PrototypeLoss:
        """Every crop of the student against the teacher's other global crops; features are ordered by crop."""
        student, teacher = self.student.dino_head, self.teacher.average.dino_head
        local = self._scheduled(self.config.local_weight_schedule, step)
        weights = None if local is None else [1.0] * 2 + [local] * self.config.local_crops_number
        with torch.no_grad():
            targets = teacher.bottleneck(teacher_features)
        result = prototype_loss(
            by_crop(student.bottleneck(features), images),
            student.last_layer,
            by_crop(targets, images),
            teacher.last_layer,
            self._center_of(targets, teacher.last_layer, self.center, temp),
            student_temp=self.config.student_temp,
            teacher_temp=temp,
            crop_weights=weights,
        )
        self._count(self._pending, result.teacher_sum, rows=len(targets))
        return result

    def _patch_loss(self, hidden: Tensor, teacher_hidden: Tensor, mask: Tensor, temp: float) -> PatchLoss:
        """Loss of the masked patches [m, D] of mask [2b, N]; a crop without masked patches counts as 0."""
        student, teacher = self.student.patch_head, self.teacher.average.patch_head
        with torch.no_grad():
            targets = teacher.bottleneck(teacher_hidden)
        result = patch_loss(
            student.bottleneck(hidden),
            student.last_layer,
            targets,
            teacher.last_layer,
            self._center_of(targets, teacher.last_layer, self.patch_center, temp),
            mask_weights(mask) / len(mask),
            student_temp=self.config.student_temp,
            teacher_temp=temp,
        )
        self._count(self._pending_patches, result.teacher_sum, rows=len(targets))
        return result

    def _koleo(self, features: Tensor) -> Tensor:
        config = self.config
        return koleo_loss(
            features, scope=config.koleo_scope, neighbours=config.koleo_neighbours, group=config.koleo_group
        )

    def _gram_loss(self, config: GramConfig, patches: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        """Of the student's `patches` [2b, N, D] of the global crops, of which the Gram teacher sees `images`."""
        network = self.backbone if self.gram_teacher is None else self.gram_teacher.network.average
        targets = gram_patches(network, images, grid=self.backbone.grid_size, antialias=config.antialias)
        pair = (compared(x, mask, level=config.level, tokens=config.tokens) for x in (patches, targets))
        return gram_loss(*pair, normalize=config.normalize, negatives=config.negatives)

    def _center_of(self, targets: Tensor, layer: Prototypes, average: Tensor, temp: float) -> Tensor:
        if self.config.centering == "centering":
            return average[0]
        return sinkhorn_center(targets, layer, temp=temp, iterations=self.config.sinkhorn_iterations)

    def _count(self, pending: PendingMean, total: Tensor, *, rows: int) -> None:
        if self.training and self.config.centering == "centering":
            pending.add(total, rows=rows)

    def teacher_temp(self, step: int) -> float:
        """Temperature of the teacher's softmax for class token and patches; its warm-up is per step."""
        given = self._scheduled(self.config.teacher_temp_schedule, step)
        if given is not None:
            return given
        return teacher_temp(
            step,
            warmup_temp=self.config.warmup_teacher_temp,
            temp=self.config.teacher_temp,
            warmup_epochs=self.config.warmup_teacher_temp_epochs * self._epoch_steps,
        )

    def momentum(self, step: int) -> float:
        given = self._scheduled(self.config.momentum_schedule, step)
        return super().momentum(step) if given is None else given

    def begin(self) -> None:
        gram = self.config.gram
        if self.gram_teacher is not None and gram is not None:
            if gram.release is not None:
                self.gram_teacher.open(gram.release)
            elif gram.start_step == 0:
                self.gram_teacher.become(self.backbone)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._pending.move(self.center, self.config.center_momentum)
        self._pending_patches.move(self.patch_center, self.config.center_momentum)
        if self.gram_teacher is not None and self.config.gram is not None and self.config.gram.refreshes(step):
            self.gram_teacher.become(self.backbone)

    def discard_pending(self) -> None:
        super().discard_pending()
        self._pending.discard()
        self._pending_patches.discard()

    def param_groups(self) -> list[ParamGroup]:
        """Layer-wise lr decay; last layers frozen at first; clipped per module: backbone with mask token, each head."""
        config = self.config
        frozen = config.freeze_last_layer_epochs * self._epoch_steps
        groups = param_groups.split(self)
        for head in ("dino_head", "ibot_head"):
            last = f"student.{head}.last_layer."
            groups = param_groups.take(groups, last, into=f"{head}_last", frozen_steps=frozen, keeps_moments=True)
        if config.layerwise_decay != 1 or config.patch_embed_lr_mult != 1:
            groups = layer_decay(
                groups,
                decay=config.layerwise_decay,
                depth=self.student.backbone.depth,
                prefix=f"student.backbone.{self.student.backbone.blocks_prefix}",
                first=("mask_token",),
                patch_embed_lr_scale=config.patch_embed_lr_mult,
            )
        of_backbone = ("mask_token", "student.local_norm.")
        modules = ("student.backbone.", "student.dino_head.", "student.ibot_head.", *of_backbone)
        groups = param_groups.clip_together(groups, *modules)
        for group in groups:
            if group.get("clip_group") in of_backbone:
                group["clip_group"] = "student.backbone."
        return groups

"""data2vec for images: predict, at masked patches, the EMA teacher's features of the full image.

Baevski et al. 2022, "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language",
section 3, and section 4.1 for images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.layers.initialize import initialize_linears
from pretrain.models.losses.latent_targets import average_layers, cosine, last_layers, normalize, target_std
from pretrain.models.pictures import drawing, feature_pictures
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of, mean_over_ranks
from pretrain.objectives.configs.data2vec import Data2VecConfig


class Data2Vec(Objective[Data2VecConfig]):
    """Batch: "image" [b, 1, C, H, W] and "mask" bool [b, N], True where the student sees the mask token; with drop path
    its uniform random numbers "drop_path" [b, depth, 2].

    The loss is the mean over the masked patches of all ranks; their number varies slightly between images.
    """

    backbone_prefixes = ("encoder.", "teacher.average.")
    head_prefixes = ("mask_token", "head.")

    def __init__(self, config: Data2VecConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        self.encoder = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.mask_dim))
        self.head = nn.Linear(backbone.embed_dim, backbone.embed_dim)
        initialize_linears(self.head, "trunc_normal", bound=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.teacher: EMA[Backbone] = EMA(backbone)
        self.teacher.average.set_drop_path(0.0)

    @property
    def backbone(self) -> Backbone:
        """The student's backbone, which the authors fine-tune."""
        return self.encoder

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.encoder)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, mask = images_of(batch, "image"), batch["mask"]
        features, pred = self.predict(images, mask, drop=batch.get("drop_path"))
        target = self.targets(images)[mask]
        loss = F.smooth_l1_loss(pred.float(), target, beta=self.config.loss_beta, reduction="none")
        return {
            "loss": mean_over_ranks(loss.mean(dim=1).sum(), mask.sum()),
            "feature_std": feature_std(features.mean(dim=1)),
            "target_std": target_std(target),
            "student_teacher_cosine": cosine(pred, target),
        }

    def predict(self, images: Tensor, mask: Tensor, *, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The student's patches [b, N, D], and the predictions for the masked ones [m, D], image by image."""
        tokens = self.encoder(images, drop=drop, mask=mask, mask_token=self.mask_token)
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return patches, self.head(patches[mask])

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of every patch of the unmasked images, fp32 [b, N, D]."""
        config = self.config
        layers = last_layers(self.teacher.average, images, config.num_target_layers, config.target_features)
        return normalize(average_layers(layers, config.target_norm), config.final_norm)

    def momentum(self, step: int) -> float:
        """EMA momentum of the update after `step` completed steps."""
        config, ramp = self.config, self.config.ema_anneal_epochs * self.horizon.steps_per_epoch
        if step >= ramp:
            return config.ema_end
        return config.ema_start + (config.ema_end - config.ema_start) * step / ramp

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.teacher.update(self.encoder, self.momentum(step - 1))

    def param_groups(self) -> list[ParamGroup]:
        """No weight decay for class token and absolute positions."""
        return param_groups.split(self, no_decay_names=param_groups.tokens_and_positions(self))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, its visible patches, all targets, the predictions."""
        images, mask = images_of(batch, "image")[:8], batch["mask"][:8]
        target = self.targets(images)
        predicted = torch.full_like(target, float("nan"))
        predicted[mask] = self.predict(images, mask)[1].float()
        rgb = drawing.to_rgb(images, mean=mean, std=std)
        shown = feature_pictures.sheet(rgb, mask, target, predicted, patch_size=self.encoder.patch_size)
        return {"input | masked | targets | predictions": shown}

"""I-JEPA: from a context block of an image, predict the EMA encoder's features of target blocks.

Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.ijepa_predictor import JEPAPredictor
from pretrain.models.losses.latent_targets import cosine, layer_norm, target_std
from pretrain.models.pictures import drawing, feature_pictures
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.ijepa import IJEPAConfig


class IJEPA(Objective[IJEPAConfig]):
    """Batch: "image" [b, 1, C, H, W], the patches of the contexts "mask_context" int64 [b, c, k] and of the target
    blocks "mask_targets" int64 [b, t, m]; with drop path its uniform random numbers "drop_path" [b, depth, 2].

    The loss is the mean over the target tokens of this call. All images of a global batch have blocks of the same
    length, so the mean does not depend on how the batch is divided. The official loader cuts blocks to a common length
    per rank; its DDP averages the means of the ranks, as is done here.
    """

    backbone_prefixes = ("teacher.average.", "encoder.")
    head_prefixes = ("predictor.",)

    def __init__(self, config: IJEPAConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        self.encoder = backbone
        self.predictor = JEPAPredictor(
            in_dim=backbone.embed_dim,
            embed_dim=config.predictor_embed_dim,
            depth=config.predictor_depth,
            num_heads=config.predictor_num_heads or backbone.num_heads,
            grid_size=backbone.grid_size,
        )
        self.teacher: EMA[Backbone] = EMA(backbone)
        self.teacher.average.set_drop_path(0.0)

    @property
    def backbone(self) -> Backbone:
        """The target encoder, which the authors evaluate."""
        return self.teacher.average

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.encoder)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, keep, blocks = images_of(batch, "image"), batch["mask_context"], batch["mask_targets"]
        context, pred = self.predict(images, keep, blocks, drop=batch.get("drop_path"))
        target = self.targets(images, blocks)[:, :, None].expand_as(pred)
        return {
            "loss": F.smooth_l1_loss(pred.float(), target),
            "feature_std": feature_std(context.mean(dim=1)),
            "target_std": target_std(target),
            "student_teacher_cosine": cosine(pred, target),
        }

    def predict(
        self, images: Tensor, keep: Tensor, blocks: Tensor, *, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context tokens [b * c, k, D] and the predictions of every block from every context [b, t, c, m, D]."""
        contexts = keep.shape[1]
        if contexts > 1:
            images = images.repeat_interleave(contexts, dim=0)
            drop = None if drop is None else drop.repeat_interleave(contexts, dim=0)
        tokens = self.encoder(images, keep=keep.flatten(0, 1), drop=drop)
        context = tokens[:, self.encoder.num_prefix_tokens :]
        return context, self.predictor(context, keep, blocks)

    def targets(self, images: Tensor, blocks: Tensor) -> Tensor:
        """The target encoder's features of the target patches, each token normalized, fp32 [b, t, m, D]."""
        tokens = layer_norm(self.teacher(images)[:, self.encoder.num_prefix_tokens :])
        rows = torch.arange(len(blocks), device=blocks.device)[:, None, None]
        return tokens[rows, blocks]

    def momentum(self, step: int) -> float:
        """EMA momentum of the update after `step` completed steps."""
        start, end = self.config.ema_start, self.config.ema_end
        return start + (end - start) * min(step / (self.horizon.total_steps * self.config.ema_length), 1.0)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.teacher.update(self.encoder, self.momentum(step - 1))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, the first context, all target features, the predictions."""
        images = images_of(batch, "image")[:8]
        keep, blocks = batch["mask_context"][:8], batch["mask_targets"][:8]
        _, pred = self.predict(images, keep, blocks)
        whole = layer_norm(self.teacher(images)[:, self.encoder.num_prefix_tokens :])
        predicted = torch.full_like(whole, float("nan"))
        for i in range(blocks.shape[1]):  # where blocks overlap, the last one is shown
            predicted.scatter_(1, blocks[:, i, :, None].expand(-1, -1, whole.shape[2]), pred[:, i, 0].float())
        hidden = torch.ones(whole.shape[:2], dtype=torch.bool, device=keep.device).scatter(1, keep[:, 0], False)
        rgb = drawing.to_rgb(images, mean=mean, std=std)
        shown = feature_pictures.sheet(rgb, hidden, whole, predicted, patch_size=self.encoder.patch_size)
        return {"input | context | targets | predictions": shown}

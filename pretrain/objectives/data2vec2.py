"""data2vec 2.0 for images: several masked views of an image learn from one pass of the teacher over the full image.

Baevski et al. 2022b, "Efficient Self-supervised Learning with Contextualized Target Representations for Vision, Speech
and Language", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.conv_decoder import ConvDecoder
from pretrain.models.layers.initialize import initialize_linears
from pretrain.models.losses.latent_targets import average_layers, cosine, last_layers, normalize, target_std
from pretrain.models.pictures import drawing, feature_pictures
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.data2vec2 import Data2Vec2Config


class Data2Vec2(Objective[Data2Vec2Config]):
    """Batch: "image" [b, 1, C, H, W], "mask" bool [b, m, N] with equal numbers of True, "decoder_noise" [b, m, N] in
    [0, 1); with drop path its uniform random numbers "drop_path" [b, m, depth, 2].

    The losses are means over views and tokens, equal in number for every image, so independent of the batch's division.
    """

    backbone_prefixes = ("encoder.", "teacher.average.")
    head_prefixes = ("decoder.",)

    def __init__(self, config: Data2Vec2Config, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        initialize_linears(backbone, "trunc_normal")
        self.encoder = backbone
        self.decoder = ConvDecoder(
            in_dim=backbone.embed_dim,
            embed_dim=config.decoder_dim,
            depth=config.decoder_layers,
            kernel=config.decoder_kernel,
            groups=config.decoder_groups,
            grid_size=backbone.grid_size,
            noise_std=config.mask_noise_std,
        )
        self.teacher: EMA[Backbone] = EMA(backbone)
        self.teacher.average.set_drop_path(0.0)

    @property
    def backbone(self) -> Backbone:
        """The student's backbone, which the authors fine-tune."""
        return self.encoder

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.encoder)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, views = images_of(batch, "image"), batch["mask"].shape[1]
        drop = batch["drop_path"].flatten(0, 1) if "drop_path" in batch else None
        keep, hidden = self.split(batch["mask"])
        tokens, pred = self.predict(images, keep, hidden, batch["decoder_noise"], drop=drop)
        whole = self.targets(images)
        target = whole.repeat_interleave(views, dim=0)
        target = target.gather(1, hidden[..., None].expand(-1, -1, target.shape[2]))
        losses = {"loss_patch": self.distance(pred, target)}
        if self.config.cls_weight:
            of_image = whole.mean(dim=1).repeat_interleave(views, dim=0)
            losses["loss_cls"] = self.config.cls_weight * self.distance(tokens[:, 0], of_image)
        return {
            "loss": losses["loss_patch"] + losses.get("loss_cls", 0.0),
            **{name: value.detach() for name, value in losses.items()},
            "feature_std": feature_std(tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)),
            "target_std": target_std(target),
            "student_teacher_cosine": cosine(pred, target),
        }

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of visible and masked patches, int64 [b * m, k] and [b * m, N - k], each in image order."""
        order = mask.flatten(0, 1).to(torch.uint8).argsort(dim=1, stable=True)
        return order.tensor_split([self.config.num_visible(mask.shape[2])], dim=1)  # pyright: ignore[reportReturnType]

    def predict(
        self, images: Tensor, keep: Tensor, hidden: Tensor, noise: Tensor, *, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encoded tokens of every view [b * m, P + k, D] and the predictions for its masked patches [b * m, N - k, D].

        Args:
            noise: uniform random numbers [b, m, N]. drop: the same, [b * m, depth, 2].
        """
        images = images.repeat_interleave(noise.shape[1], dim=0)
        tokens = self.encoder(images, keep=keep, drop=drop)
        visible = tokens[:, self.encoder.num_prefix_tokens :]
        return tokens, self.decoder(visible, keep, hidden, noise.flatten(0, 1))

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of every patch of the full images, fp32 [b, N, D]."""
        config = self.config
        layers = last_layers(self.teacher.average, images, config.average_top_k_layers, config.target_features)
        return normalize(average_layers(layers, config.target_norm), config.final_norm)

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """Scaled sum over channels of the squared (or smooth L1) error, mean over all else; both [..., D]."""
        scale = self.config.loss_scale or pred.shape[-1] ** -0.5
        if self.config.loss_beta:
            error = F.smooth_l1_loss(pred.float(), target, beta=self.config.loss_beta, reduction="none")
        else:
            error = (pred.float() - target).square()
        return error.sum(dim=-1).mean() * scale

    def momentum(self, step: int) -> float:
        """EMA momentum of the update that completes `step` steps."""
        config = self.config
        if step >= config.ema_anneal_steps:
            return config.ema_end
        return config.ema_start + (config.ema_end - config.ema_start) * step / config.ema_anneal_steps

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.teacher.update(self.encoder, self.momentum(step))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, its first masked view, all targets, the predictions."""
        images, mask = images_of(batch, "image")[:8], batch["mask"][:8, :1]
        keep, hidden = self.split(mask)
        _, pred = self.predict(images, keep, hidden, batch["decoder_noise"][:8, :1])
        target = self.targets(images)
        places = hidden[..., None].expand(-1, -1, target.shape[2])
        predicted = torch.full_like(target, float("nan")).scatter(1, places, pred.float())
        rgb = drawing.to_rgb(images, mean=mean, std=std)
        shown = feature_pictures.sheet(rgb, mask[:, 0], target, predicted, patch_size=self.encoder.patch_size)
        return {"input | visible | targets | predictions": shown}

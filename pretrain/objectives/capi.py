"""CAPI: from a block of visible patches, predict the clusters of the EMA teacher's features of hidden ones.

Darcet et al. 2025, "Cluster and Predict Latent Patches for Improved Masked Image Modeling", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.schedule import warmup_cosine
from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.cross_predictor import CrossPredictor
from pretrain.models.heads.projection import Prototypes
from pretrain.models.layers.free_rope import FreeRope
from pretrain.models.losses.clustering import OnlineClustering, unit
from pretrain.models.pictures import drawing, feature_pictures
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, feature_std, images_of
from pretrain.objectives.configs.capi import CAPIConfig
from pretrain.objectives.whole_step import WholeStep


class CAPI(WholeStep[CAPIConfig]):
    """Batch: "image" [b, 1, C, H, W], patches "mask_visible" int64 [b, k] and "mask_predicted" int64 [b, m]; with drop
    path its uniform random numbers "drop_path" [b, depth + predictor_depth, 2].

    The student is `encoder`, `predictor` and `head`. `clustering` is trained too, by its own loss, on the features of
    the `teacher`. Assignments are balanced over all images of a step. Every image has the same number of patches of
    each kind, so losses are means that do not depend on how the batch is divided.
    """

    backbone_prefixes = ("teacher.average.", "encoder.")
    head_prefixes = ("predictor.", "head.", "clustering.")

    def __init__(self, config: CAPIConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        self._masses: Tensor | None = None  # of the step, where it has several micro-batches
        width = config.predictor_embed_dim or backbone.embed_dim
        self.encoder = backbone
        self.predictor = CrossPredictor(
            in_dim=backbone.embed_dim,
            embed_dim=width,
            depth=config.predictor_depth,
            num_heads=config.predictor_num_heads or backbone.num_heads,
        )
        self.head = Prototypes(width, config.num_clusters, unit_length=False)
        nn.init.trunc_normal_(self.head.weight_v, std=0.02)
        self.clustering = OnlineClustering(
            backbone.embed_dim,
            config.num_clusters,
            target_temp=config.teacher_temp,
            pred_temp=config.clustering_temp,
            iterations=config.sinkhorn_iterations,
            bias=config.clustering_bias,
            positionwise=config.positionwise,
        )
        for norm in (backbone.trunk.norm, self.predictor.norm):
            norm.requires_grad_(config.final_norm_weights)
        for module in self.modules():
            if isinstance(module, FreeRope):
                module.requires_grad_(config.frequencies_lr_mult > 0)
        backbone.set_drop_path(config.drop_path_rate, uniform=True, subset=config.drop_path_subset)
        self.predictor.set_drop_path(config.drop_path_rate, subset=config.drop_path_subset)
        self.teacher: EMA[Backbone] = EMA(backbone)
        self.teacher.average.set_drop_path(0.0)

    @property
    def backbone(self) -> Backbone:
        """The teacher, which the authors evaluate."""
        return self.teacher.average

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.teacher, self.encoder)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, asked = images_of(batch, "image"), batch["mask_predicted"]
        features = self.features(images)
        if self.survey:
            self.keep(features)
            return {}
        masses = self.masses(features)
        clustering = self.clustering.loss(features, masses)
        targets = self.targets(features, masses, asked)
        tokens, pred = self.predict(images, batch["mask_visible"], asked, drop=batch.get("drop_path"))
        prediction = self.prediction_loss(pred, targets)
        return {
            "loss": prediction + clustering.loss,
            "loss_prediction": prediction.detach(),
            "loss_clustering": clustering.loss.detach(),
            "teacher_entropy": clustering.entropy,
            "teacher_kl_uniform": math.log(self.config.num_clusters) - clustering.mean_entropy,
            "feature_std": feature_std(tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)),
        }

    def features(self, images: Tensor) -> Tensor:
        """The teacher's features of all patches, of length 1, fp32 [b, N, D]."""
        return unit(self.teacher(images)[:, self.encoder.num_prefix_tokens :])

    def masses(self, features: Tensor) -> Tensor:
        """Log masses of the clusters for `OnlineClustering.assign`, of all images of the step."""
        whole = self.of_step(features, dim=0)
        if whole is features:
            return self.clustering.masses(features)
        if self._masses is None:
            self._masses = self.clustering.masses(whole)
        return self._masses

    def targets(self, features: Tensor, masses: Tensor, asked: Tensor) -> Tensor:
        """Assignments of the patches `asked`, fp32 [b, m, K]."""
        rows = features.gather(1, asked[..., None].expand(-1, -1, features.shape[2]))
        return self.clustering.assign(rows, masses[asked] if self.config.positionwise else masses)

    def predict(
        self, images: Tensor, keep: Tensor, asked: Tensor, *, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the visible patches [b, P + k, D] and predicted features [b, m, D'] of the patches `asked`."""
        patch = self.encoder.patch_size
        grid = images.shape[2] // patch, images.shape[3] // patch
        drops = (None, None) if drop is None else drop.tensor_split([len(drop[0]) - self.config.predictor_depth], dim=1)
        tokens = self.encoder(images, keep=keep, drop=drops[0])
        return tokens, self.predictor(tokens, keep, asked, grid=grid, drop=drops[1])

    def prediction_loss(self, pred: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the clusters of predicted features [b, m, D'] with assignments [b, m, K]."""
        return -(targets * F.log_softmax(self.logits(pred), dim=-1)).sum(dim=-1).mean()

    def logits(self, pred: Tensor) -> Tensor:
        """Of the clusters, by the student's temperature, fp32 [b, m, K], of predicted features [b, m, D']."""
        return self.head(F.normalize(pred.float(), dim=-1)).float() / self.config.student_temp

    @contextmanager
    def surveying(self) -> Generator[None]:
        self._masses = None
        with super().surveying():
            yield

    def momentum(self, step: int) -> float:
        """EMA momentum of the update after `step` completed steps."""
        config, total = self.config, self.horizon.total_steps
        return warmup_cosine(
            step,
            start=1.0,
            peak=config.momentum_teacher,
            final=config.final_momentum_teacher,
            warmup_steps=round(config.momentum_warmup * total),
            total_steps=total,
            warmup_form="closed",
            share=config.momentum_share,
        )

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._masses = None
        self.teacher.update(self.encoder, self.momentum(step - 1))

    def discard_pending(self) -> None:
        super().discard_pending()
        self._masses = None

    def param_groups(self) -> list[ParamGroup]:
        """Multiples of learning rate and weight decay by name, as in the official code."""

        def scales(name: str) -> tuple[float, float | None]:
            config = self.config
            if name.startswith("clustering."):
                return config.clustering_lr_scale, config.clustering_decay_scale
            rate = config.patch_embed_lr_mult if "patch_embed" in name else 1.0
            rate *= config.frequencies_lr_mult if name.endswith(".rope.freqs") else 1.0
            is_norm = "norm" in name and name.endswith(".weight")
            return rate, config.norm_decay_scale if is_norm else None

        def change(source: ParamGroup, at: tuple[float, float | None]) -> param_groups.GroupChange:
            rate, decay = at
            decay = source["weight_decay_scale"] if decay is None else decay
            name = f"{source['name']}_lr{rate:g}_wd{decay:g}"
            return {"name": name, "lr_scale": rate, "weight_decay_scale": decay}

        return param_groups.divide(param_groups.split(self), scales, change)

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, what is visible, the teacher's features, the predicted clusters of
        all hidden patches as features: the mean of the clusters' weights."""
        images, keep = images_of(batch, "image")[:8], batch["mask_visible"][:8]
        whole = self.features(images)
        hidden = torch.ones(whole.shape[:2], dtype=torch.bool, device=keep.device).scatter(1, keep, False)
        asked = hidden.nonzero()[:, 1].view(len(images), -1)
        drop = None if "drop_path" not in batch else batch["drop_path"][:8]
        _, pred = self.predict(images, keep, asked, drop=drop)
        of_clusters = self.logits(pred).softmax(dim=-1) @ self.clustering.weight.float()
        places = asked[..., None].expand(-1, -1, whole.shape[2])
        predicted = torch.full_like(whole, float("nan")).scatter(1, places, unit(of_clusters))
        rgb = drawing.to_rgb(images, mean=mean, std=std)
        shown = feature_pictures.sheet(rgb, hidden, whole, predicted, patch_size=self.encoder.patch_size)
        return {"input | visible | teacher | predicted clusters": shown}

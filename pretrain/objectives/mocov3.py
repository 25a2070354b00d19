"""Momentum contrast without a queue: a query is matched with the key of the same image among those of the full batch.

Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", section 3 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.schedule import cosine
from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.projection import mlp_head
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.losses.contrastive import contrastive_loss
from pretrain.models.pictures import drawing
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon, Objective, feature_std
from pretrain.objectives.configs.mocov3 import MoCoV3Config


class Encoder(nn.Module):
    """Backbone and projector, of the base encoder or of the momentum encoder."""

    def __init__(self, backbone: Backbone, projector: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] -> features [b, D], projections [b, P]."""
        features = self.backbone.forward_cls(images, drop)
        return features, self.projector(features)


class MoCoV3(Objective[MoCoV3Config]):
    """Batch: "views" [b, 2, C, H, W], with drop path its uniform random numbers "drop_path" [b, 2, depth, 2].

    State: `base` and `predictor` (parameters), `momentum_encoder` (buffers), running statistics of the batch norms,
    which training does not read.

    The official code updates the momentum encoder in the forward pass, before it computes the keys. Here a forward pass
    changes no weights: `begin` and `after_step` make the update of the next step, with that step's momentum.
    Negatives are the other images of a micro-batch, over all ranks; batch norm sees one view of it at a time.
    """

    backbone_prefixes = ("base.backbone.", "momentum_encoder.average.backbone.")
    head_prefixes = ("base.projector.", "predictor.", "momentum_encoder.average.projector.")

    def __init__(self, config: MoCoV3Config, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        hidden, out = config.hidden_dim, config.projection_dim
        projector = mlp_head(backbone.embed_dim, hidden, out, num_layers=config.projector_layers)
        predictor = mlp_head(out, hidden, out, num_layers=config.predictor_layers, last_norm=config.predictor_last_norm)
        if config.freeze_patch_embed:
            for name, parameter in backbone.named_parameters():
                if "patch_embed.proj." in f".{name}":
                    parameter.requires_grad_(False)
        base = Encoder(backbone, projector)
        self.base = synchronized(base) if config.sync_bn else base
        self.predictor = synchronized(predictor) if config.sync_bn else predictor
        self.momentum_encoder: EMA[Encoder] = EMA(self.base)
        self.momentum_encoder.average.backbone.set_drop_path(0.0)

    @property
    def backbone(self) -> Backbone:
        """The base encoder's backbone, which the paper evaluates."""
        return self.base.backbone

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        return [(self.momentum_encoder, self.base)]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        first, second = self.views(batch)
        drops = batch["drop_path"].unbind(1) if "drop_path" in batch else (None, None)
        features, first_query = self._query(first, drops[0])
        _, second_query = self._query(second, drops[1])
        key_features, first_key = self.momentum_encoder(first)
        _, second_key = self.momentum_encoder(second)
        temperature = self.config.temperature
        loss, accuracy = contrastive_loss(first_query, second_key, temperature=temperature)
        swapped_loss, swapped_accuracy = contrastive_loss(second_query, first_key, temperature=temperature)
        return {
            "loss": loss + swapped_loss,
            "accuracy": (accuracy + swapped_accuracy) / 2,
            "feature_std": feature_std(features),
            "student_teacher_cosine": F.cosine_similarity(features.detach().float(), key_features.float()).mean(),
        }

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both views, [b, C, H, W] each."""
        views = batch["views"]
        if views.ndim != 5 or views.shape[1] != 2:
            raise ValueError(f"batch['views'] must be [b, 2, C, H, W], got {list(views.shape)}")
        return views[:, 0], views[:, 1]

    def momentum(self, step: int) -> float:
        """Momentum of the update before the keys of the step after `step` completed ones."""
        start = self.config.momentum
        return cosine(step, start, 1.0, self.horizon.total_steps) if self.config.momentum_cosine else start

    def move_momentum_encoder(self, step: int) -> None:
        """Update the momentum encoder for the keys of the step after `step` completed ones."""
        self.momentum_encoder.update(self.base, self.momentum(step))

    def begin(self) -> None:
        """Changes nothing where the momentum encoder equals the base encoder, as in a run from random weights."""
        self.move_momentum_encoder(0)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.move_momentum_encoder(step)

    def param_groups(self) -> list[ParamGroup]:
        """Weight decay for every parameter, as in the official code; LARS itself excludes vectors."""
        return param_groups.split(self, decay_all=True)

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """Both views of the first images, and the similarities of the queries of one to the keys of the other."""
        first, second = (views[:8] for views in self.views(batch))
        rgb = torch.stack([drawing.to_rgb(views, mean=mean, std=std) for views in (first, second)], dim=1)
        was_training = self.training
        self.eval()  # drawing must not change the running statistics
        queries, keys = self._query(first, None)[1], self.momentum_encoder(second)[1]
        self.train(was_training)
        alike = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T
        chart = drawing.heat(alike.clamp(min=0)[None, None], (16 * len(first), 16 * len(first)))
        return {"views": drawing.sheet(rgb), "queries x keys": chart[0, 0]}

    def _query(self, images: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        features, projected = self.base(images, drop)
        return features, self.predictor(projected)

"""LeJEPA: the crops of an image have the same projection, and projections are distributed as N(0, I). No teacher, no
stopped gradient, no predictor; one weight.

Balestriero & LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import MLP  # pyright: ignore[reportMissingTypeStubs]

from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.losses.sigreg import draw_directions, sigreg
from pretrain.objectives.base import Horizon, feature_std
from pretrain.objectives.configs.lejepa import LeJEPAConfig
from pretrain.objectives.multi_crop import MultiCrop, by_crop
from pretrain.objectives.whole_step import WholeStep


class LeJEPA(WholeStep[LeJEPAConfig], MultiCrop[LeJEPAConfig]):
    """State: `encoder` and `projector`.

    The authors publish two losses, with the crops' projections z [V, B, P] of all B images of a step:

        multicrop   mean |z - mean of the global crops|^2 + w sigreg(all V * B rows as one sample)
        minimal     (1 - w) mean |z - mean of all crops|^2 + w (mean over crops of sigreg(B rows))
    """

    head_prefixes = ("projector.",)

    def __init__(self, config: LeJEPAConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config = config
        self.encoder = backbone
        backbone.pos_resize = "antialias"  # as in the authors' networks, which are timm's
        projector = nn.Sequential(
            nn.Linear(backbone.embed_dim, config.embedding_dim),
            MLP(config.embedding_dim, list(config.projector_dims), norm_layer=nn.BatchNorm1d),
        )
        self.projector = synchronized(projector) if config.sync_bn else projector

    @property
    def backbone(self) -> Backbone:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        features = self.encode(batch)
        if self.survey:
            self.keep(features)
            return {}
        features = self.of_step(features, dim=1)
        z = by_crop(self.projector(features.flatten(0, 1)), features.shape[1])
        invariance, statistic = self.parts(z, self.directions(step, z.device))
        weight = self.config.sigreg_weight
        return {
            "loss": invariance * (1 - weight if self.config.form == "minimal" else 1) + weight * statistic,
            "invariance": invariance.detach(),
            "sigreg": statistic.detach(),
            "feature_std": feature_std(features[0]),
            "projection_std": z.detach().float().std(dim=1, correction=0).mean(),
        }

    def encode(self, batch: Batch) -> Tensor:
        """Features of every crop, [V, b, D], global crops first."""
        crops, drop = self.crops(batch), self.drop_path(batch)
        drops = [None] * len(crops) if drop is None else torch.split(drop, [len(part) for part in crops])
        features = [self.encoder.forward_cls(*given) for given in zip(crops, drops, strict=True)]
        return by_crop(torch.cat(features), len(batch["global"]))

    def parts(self, z: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Disagreement of the crops, and the statistic of SIGReg, of projections [V, B, P] and directions [P, K]."""
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        minimal, config = self.config.form == "minimal", self.config
        centre = (z if minimal else z[: config.num_global]).mean(dim=0)
        samples = z if minimal else z.flatten(0, 1)
        statistic = sigreg(
            samples, directions, t_max=config.t_max, num_points=config.num_points, clip=config.sigreg_clip
        )
        return (z - centre).square().mean(), statistic.mean()

    def directions(self, step: int, device: torch.device) -> Tensor:
        """Unit vectors [P, K] of the step after `step` completed ones."""
        return draw_directions(self.config.projector_dims[-1], self.config.num_slices, step=step, device=device)

"""The kNN probe of a run: labelled shards, opened and checked before training starts."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config import PretrainConfig
from pretrain.data.dataset import Dataset
from pretrain.data.evaluate import EvalImages
from pretrain.distributed import World
from pretrain.probes.knn import pixel_features, probe, vit_features


class OnlineProbe:
    """kNN accuracy of a backbone on the shards that `config.probe` names; each rank encodes a share.

    Raises:
        ValueError: the shards are missing, not indexed or carry no labels.
    """

    def __init__(self, config: PretrainConfig, world: World):
        assert config.probe is not None
        self.settings, self.world = config.probe, world
        self.bank, self.queries = (
            EvalImages(
                Dataset.open(shards),
                config.model.size,
                in_chans=config.model.in_chans,
                mean=config.mean,
                std=config.std,
                batch_size=config.probe.batch_size,
                resize=config.probe.resize,
                max_samples=config.probe.max_images,
                rank=world.rank,
                world=world.world_size,
            )
            for shards in (config.probe.train_shards, config.probe.val_shards)
        )

    def __call__(self, backbone: nn.Module, *, with_pixels: bool = False) -> dict[str, float]:
        """Accuracy by kind of feature; `with_pixels` adds the baseline without any network."""
        was_training = backbone.training
        backbone.eval()

        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            return vit_features(backbone, images) | (pixel_features(images) if with_pixels else {})

        try:
            return dict(
                probe(
                    self.bank,
                    self.queries,
                    features,
                    device=self.world.device,
                    k=self.settings.k,
                    temperature=self.settings.temperature,
                )
            )
        finally:
            backbone.train(was_training)

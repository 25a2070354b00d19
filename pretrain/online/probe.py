"""The probe of a run: labelled shards, opened and checked before training starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pretrain.config import PretrainConfig
from pretrain.core.distributed import World
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views.specs import ViewSpec
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.probes.features import backbone_features, pixel_features
from pretrain.probes.protocol import ProbeRequest, probe


class OnlineProbe:
    """kNN and optionally linear accuracy of a backbone on the shards of `config.probe`; each rank encodes a share.

    Raises:
        ValueError: the shards are missing, not indexed or carry no labels.
    """

    def __init__(self, config: PretrainConfig, world: World, *, give_up: Callable[[], bool] | None = None):
        assert config.probe is not None
        self.world = world
        clip = next((view for view in config.objective.views(config.model) if isinstance(view, ViewSpec)), None)
        self.asked = ProbeRequest((config.probe.k,), config.probe.temperature, config.probe.linear, both=False)
        self.bank, self.queries = (
            EvalImages(
                Dataset.open(shards),
                config.model.size,
                in_chans=config.model.in_chans,
                mean=config.mean,
                std=config.std,
                batch_size=config.probe.batch_size,
                resize=config.probe.resize,
                orientation=config.data.orientation,
                value_range=config.data.range,
                frames=clip.frames if clip else 0,
                stride=clip.stride if clip else 1,
                max_samples=config.probe.max_images,
                rank=world.rank,
                world_size=world.world_size,
                give_up=give_up,
            )
            for shards in (config.probe.train_shards, config.probe.val_shards)
        )

    def __call__(self, backbone: ImageEncoder, *, with_pixels: bool = False) -> dict[str, float]:
        """Accuracy by probe and kind of feature, "knn/cls"; `with_pixels` adds the baseline of raw pixels.

        Raises:
            StoppedWaitingError: on every rank, `give_up` was true on one.
        """
        was_training = backbone.training
        backbone.eval()

        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            return backbone_features(backbone, images) | (pixel_features(images) if with_pixels else {})

        try:
            scores, _ = probe(self.bank, self.queries, features, device=self.world.device, asked=self.asked)
        finally:
            backbone.train(was_training)
        found = {f"knn/{kind}": score.knn[self.asked.ks[0]] for kind, score in scores.items()}
        linear = {f"linear/{kind}": score.linear.accuracy for kind, score in scores.items() if score.linear}
        return found | linear

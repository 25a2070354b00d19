"""What the pixel tasks share: maps of a backbone, training on crops, inference in windows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.batches import Sample
from finetune.data.examples import Example
from finetune.data.transforms.dense import DenseEval, DenseTrain
from finetune.dense.blocks import four_blocks
from finetune.dense.build import dense_backbone
from finetune.heads.pixels.dense_parts import resize
from finetune.predictions import Classes, Prediction
from finetune.tasks import sliding
from finetune.tasks.base import Task
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.backbones.contract import Backbone
from pretrain.models.layers.sync_batch_norm import BatchStatistics


class PixelTask(Task):
    """Base of the pixel tasks: `self.dense` computes the maps that a head reads.

    Args:
        config: a section with head, blocks, frozen, window, steps, resize, slide, scales and flip.
    """

    backbone_prefix = "dense.backbone."
    head_prefixes = ("head.",)

    def __init__(self, config: Any, opened: OpenedBackbone, classes: Classes):
        super().__init__(config, opened, classes)
        backbone = opened.backbone
        plain = "layers" in backbone.provides
        # Heads of one map read it normalized, as DINOv2's and DINOv3's probes; of four, raw, as BEiT and DPT.
        norm = config.head.default_maps == 1 or not plain
        self.dense = dense_backbone(backbone, indices=_indices(config, backbone, plain=plain), norm=norm)
        self.frozen = config.frozen
        if self.frozen:
            self.dense.requires_grad_(False)
        self._statistics: BatchStatistics | None = None

    def losses(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The result of `forward`: scalars of one micro-batch."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        if self._statistics is None:
            self._statistics = BatchStatistics(self)
        self._statistics.remember()
        return self.losses(batch, step)

    def after_step(self, step: int) -> None:
        if self._statistics is not None:
            self._statistics.keep()
        super().after_step(step)

    def discard_pending(self) -> None:
        if self._statistics is not None:
            self._statistics.restore()
        super().discard_pending()

    def train(self, mode: bool = True) -> PixelTask:
        """A frozen backbone stays in eval mode: no stochastic depth, no new statistics."""
        super().train(mode)
        if self.frozen:
            self.dense.eval()
        return self

    def fill(self) -> tuple[float, ...]:
        """The pixel value, in 0 to 255, that normalizes to 0: it fills what is outside an image."""
        return tuple(value * 255 for value in self.mean.flatten().tolist())

    def crops(self, *, void: float, cat_max_ratio: float = 1.0, scale_values: bool = False) -> PixelTrain:
        """The training transform of the section; the arguments are those of `DenseTrain`."""
        config = self.config
        transform = DenseTrain(
            crop=config.window,
            resize=config.resize,
            scale=config.scale,
            hflip=config.hflip,
            photometric=config.photometric,
            cat_max_ratio=cat_max_ratio,
            void=void,
            fill=self.fill(),
            scale_values=scale_values,
        )
        return PixelTrain(transform)

    def eval_transform(self) -> PixelEval:
        return PixelEval(DenseEval(self.config.resize))

    def map_of(self, image: Tensor) -> Tensor:
        """The output of one image [C, H, W] that a prediction is read from: [K, h, w]."""
        raise NotImplementedError

    def values(self, scores: Tensor) -> np.ndarray:
        """The map [h, w] of a prediction, of outputs [K, h, w] at the size of the image."""
        raise NotImplementedError

    def as_prediction(self, values: np.ndarray) -> Prediction:
        """A map [H, W] of `values` as a prediction."""
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, batch: dict[str, Any]) -> list[Tensor]:
        """The outputs [K, h, w] of each image of a batch of `PixelEval`, at its own size."""
        pairs = zip(batch["image"], original_sizes(batch), strict=True)
        return [resize(self.map_of(image)[None], size)[0].float() for image, size in pairs]

    def over_image(self, image: Tensor, *, probabilities: bool) -> Tensor:
        """The output of one image [C, H, W] by the protocol of the section: [K, H, W]; see `sliding`."""
        config = self.config

        def values(images: Tensor) -> Tensor:
            return self.outputs(images)[0]

        def infer(scaled: Tensor) -> Tensor:
            window = config.window if config.slide else (scaled.shape[2], scaled.shape[3])
            steps = config.steps if config.slide else window
            return sliding.slide(values, scaled, window=window, stride=steps)

        images = self.normalize(image[None])
        return sliding.over_scales(infer, images, scales=config.scales, flip=config.flip, probabilities=probabilities)

    @property
    def input_size(self) -> tuple[int, int]:
        return self.config.window

    def at_size(self, size: tuple[int, int]) -> PixelTask:
        config, own = self.config, self.config.window
        down, across = (max(1, step * new // old) for step, new, old in zip(config.steps, size, own, strict=True))
        resize = None if config.resize is None else max(1, config.resize * min(size) // min(own))
        made = copy.deepcopy(self)
        made.config = config.model_copy(update={"crop": size, "stride": (down, across), "resize": resize})
        return made

    def preparation(self) -> str:
        return self.inference_protocol()

    def preparation_facts(self) -> dict[str, Any]:
        config, mean = self.config, self.mean.flatten().tolist()
        window, steps = (list(config.window), list(config.steps)) if config.slide else (None, None)
        return {
            "shorter_side": config.resize,
            "window": window,
            "steps": steps,
            "mean": mean,
            "interpolation": "bilinear",
        }

    @property
    def example_parts(self) -> tuple[str, ...] | None:
        plain = tuple(self.config.scales) == (1.0,) and not self.config.flip
        return ("windows", self.config.name) if plain else None

    def inference_protocol(self) -> str:
        """How predictions are computed, in words."""
        config = self.config
        size = "images as they are" if config.resize is None else f"shorter side {config.resize} px"
        parts = [size, "whole images"]
        if config.slide:
            (height, width), (down, across) = config.window, config.steps
            parts[1] = f"windows of {height} x {width} px every {down}, {across}"
        if tuple(config.scales) != (1.0,):
            parts.append("scales " + ", ".join(f"{scale:g}" for scale in config.scales))
        if config.flip:
            parts.append("and mirrored")
        return ", ".join(parts)


@dataclass(frozen=True)
class PixelTrain:
    """A random crop as "image" [C, h, w] and "target" [h, w]."""

    transform: DenseTrain

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        image, target = self.transform(example.image, example.target, rng)
        return {"image": image, "target": target}


@dataclass(frozen=True)
class PixelEval:
    """The complete image as "image" [C, h, w], with "original_size" int64 [2], height and width."""

    transform: DenseEval

    def __call__(self, example: Example) -> Sample:
        return {"image": self.transform(example.image), "original_size": torch.tensor(example.image.shape[:2])}


def original_sizes(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of each image of a batch of `PixelEval`."""
    return [(int(height), int(width)) for height, width in batch["original_size"]]


def _indices(config: Any, backbone: Backbone, *, plain: bool) -> Sequence[int] | None:
    """The blocks of a plain backbone, or the stages of a hierarchical one; None: all its stages."""
    if config.blocks is not None:
        return config.blocks
    if config.head.default_maps > 1:
        return four_blocks(backbone.depth) if plain else None
    return (backbone.num_stages - 1,)

"""A classifier by glimpses over a frozen network, which encodes the patches that the retina cuts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.heads.pooled.glimpses import GlimpseNetwork, Look, retina
from pretrain.models.backbones.contract import Backbone


class GlimpseHead(nn.Module):
    """Images through glimpses and a backbone to logits [b, K].

    A glimpse is `scales` squares around a location, the first of half the image's side, each next one twice as large;
    all reach the backbone at its own image size. In evaluation the first glimpse is at the centre, and locations are
    the means of their distribution.

    Args:
        count: number of glimpses. hidden: width of each of the two layers that read patches and locations.
        std: of the choice of a location, 1 being half an image.

    Raises:
        ValueError: the backbone's images are not square, or of an odd side.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, count: int, scales: int, hidden: int, std: float):
        super().__init__()
        height, width = backbone.img_size
        if height != width or height % 2:
            raise ValueError(f"task.train: glimpses need square images with an even side, not {height} x {width}")
        self.size, self.scales = height // 2, scales
        self.network = GlimpseNetwork(
            scales * backbone.embed_dim,
            num_classes,
            num_glimpses=count,
            glimpse_hidden=hidden,
            location_hidden=hidden,
            std=std,
        )

    @property
    def noise(self) -> tuple[int, int]:
        """Shape of the uniform random numbers of one image: the first location, then the choice of each next one."""
        return self.network.num_glimpses + 1, 2

    def forward(self, backbone: Backbone, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop` is not read: the backbone is frozen."""
        del drop
        return self.look(backbone, images).log_probabilities

    def look(self, backbone: Backbone, images: Tensor, uniform: Tensor | None = None) -> Look:
        """The glimpses at normalized images; `uniform` [b, *noise]: random numbers of the locations, in training."""

        def encode(at: Tensor) -> Tensor:
            squares = retina(images, at, size=self.size, count=self.scales, factor=2).flatten(0, 1)
            squares = F.interpolate(squares, backbone.img_size, mode="bilinear", align_corners=False)
            return backbone.forward_cls(squares).unflatten(0, (-1, self.scales)).flatten(1)

        if uniform is None:
            return self.network(encode, images.new_zeros(images.shape[0], 2))
        first = 2 * uniform[:, 0] - 1
        return self.network(encode, first, normal(uniform[:, 1:]))


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones of [0, 1)."""
    return math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-6, 1 - 1e-6))

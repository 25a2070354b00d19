"""The simple feature pyramid of ViTDet (Li et al. 2022, section 3): every scale from the last map of a ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

Norm = Literal["layer", "none"]


def norm_of(kind: Norm, channels: int) -> nn.Module:
    """The norm of a map: over the channels of each cell, as in ViTDet, or none."""
    return LayerNorm2d(channels) if kind == "layer" else nn.Identity()


class SimpleFPN(nn.Module):
    """One map [b, D, h, w] -> a map [b, out_channels, h * scale, w * scale] for each of the scales.

    Args:
        scales: among 4, 2, 1 and 1/2, relative to the backbone's map.

    Raises:
        ValueError: another scale.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        norm: Norm = "layer",
    ):
        super().__init__()
        self.scales, self.out_channels = tuple(scales), out_channels
        self.stages = nn.ModuleList(_stage(in_channels, out_channels, scale, norm) for scale in scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [stage(x) for stage in self.stages]


def _stage(width: int, out_channels: int, scale: float, norm: Norm) -> nn.Sequential:
    if scale == 4:
        resized = [
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            norm_of(norm, width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        ]
        width = width // 4
    elif scale == 2:
        resized = [nn.ConvTranspose2d(width, width // 2, 2, stride=2)]
        width = width // 2
    elif scale == 1:
        resized = []
    elif scale == 0.5:
        resized = [nn.MaxPool2d(2, stride=2)]
    else:
        raise ValueError(f"scale {scale} of a simple feature pyramid: expected 4, 2, 1 or 0.5")
    biased = norm == "none"
    return nn.Sequential(
        *resized,
        nn.Conv2d(width, out_channels, 1, bias=biased),
        norm_of(norm, out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=biased),
        norm_of(norm, out_channels),
    )

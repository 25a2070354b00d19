"""DPT's decoder (Ranftl et al. 2021, "Vision Transformers for Dense Prediction", section 3): four maps, fused upwards.

The readout token is ignored (the paper's "ignore" variant), so that maps of any backbone can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from finetune.heads.pixels.dense_parts import MapReader, resize

REASSEMBLED = (96, 192, 384, 768)


class Reassemble(nn.Module):
    """Four maps of equal stride -> maps of `widths` channels at 4, 2, 1 and 1/2 times the size."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int]):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, widths, strict=True))
        self.resample = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(self.resample, self.project, maps, strict=True)
        return [resample(project(x)) for resample, project, x in parts]


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions with ReLU before each, added to the input (Lin et al. 2017, RefineNet)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(self.relu(x))))


class Fusion(nn.Module):
    """A level joined with the result of the coarser one, at the requested size."""

    def __init__(self, width: int, *, joins: bool):
        super().__init__()
        self.unit1 = ResidualUnit(width) if joins else None
        self.unit2 = ResidualUnit(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.unit1 is not None and coarser is not None:
            x = self.unit1(x) + resize(coarser, x.shape[2:])
        return self.project(resize(self.unit2(x), size))


class DPT(MapReader):
    """Four maps -> [b, out_channels, h, w] at twice the grid of its finest level (half the image, for stride 16).

    Args:
        channels, strides: of the four maps; maps of equal stride are reassembled to a pyramid.
        width: channels of the decoder.
        reassembled: channels of the pyramid.

    Raises:
        ValueError: not four maps.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int,
        *,
        width: int = 256,
        reassembled: Sequence[int] = REASSEMBLED,
    ):
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"DPT reads 4 maps, got {len(channels)}; choose 4 blocks")
        equal = len(set(strides)) == 1
        self.reassemble = Reassemble(channels, reassembled) if equal else None
        inputs = reassembled if equal else channels
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 3, padding=1, bias=False) for count in inputs)
        self.fusions = nn.ModuleList(Fusion(width, joins=level < 3) for level in range(4))
        self.project = nn.Conv2d(width, width // 2, 3, padding=1)
        self.refine = nn.Sequential(nn.Conv2d(width // 2, max(width // 8, 8), 3, padding=1), nn.ReLU(inplace=True))
        self.out = nn.Conv2d(max(width // 8, 8), out_channels, 1)

    def forward(self, maps: Sequence[Tensor], uniforms: Tensor | None = None) -> Tensor:
        """`uniforms` is not read: there is no dropout."""
        if self.reassemble is not None:
            maps = self.reassemble(maps)
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        sizes.insert(0, (2 * sizes[0][0], 2 * sizes[0][1]))
        fused: Tensor | None = None
        for level, (finer, _) in reversed(list(enumerate(pairwise(sizes)))):
            fused = self.fusions[level](levels[level], fused, finer)
        assert fused is not None
        return self.out(self.refine(self.project(fused)))

"""Features of images as a program holds them: decoded, cropped and normalized as the backbone expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.core.images import Orientation, ValueRange
from pretrain.data.views.center_crop import CenterCrop
from pretrain.data.views.pixels import ImageInput, to_images
from pretrain.models.backbones.contract import ImageEncoder

Size = int | tuple[int, int]


@dataclass(frozen=True, repr=False)
class ImageFeatures:
    """Features of n images in fp32 on the CPU.

    Attributes:
        pooled: [n, D], what timm's `model(images)` returns: the class token; without one the mean of the patches.
        cls: [n, D], the class token, where the backbone has one.
        patches: [n, D, h, w], a map of the patch tokens, where it was requested.
    """

    pooled: Tensor
    cls: Tensor | None = None
    patches: Tensor | None = None

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in vars(self).items() if value is not None}
        return f"ImageFeatures({', '.join(f'{name} {shape}' for name, shape in shapes.items())})"


class FeatureExtractor:
    """A frozen backbone with its normalization.

    Args:
        backbone: with its weights.
        mean, std: per channel of [0, 1] pixels.
        title: its source in words.
        report: how the weights matched, a line each.
        value_range: of the stored values of files and of arrays of more than 8 bits, as `data.range`.
        orientation: exif: photos given as files are turned upright; stored: their EXIF orientation is ignored.
    """

    def __init__(
        self,
        backbone: ImageEncoder,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        title: str,
        report: Sequence[str] = (),
        orientation: Orientation = "exif",
        value_range: ValueRange | None = None,
        device: torch.device | str = "cpu",
    ):
        self.backbone = backbone.requires_grad_(False).eval().to(device)
        self.mean, self.std, self.title, self.report = tuple(mean), tuple(std), title, tuple(report)
        self.orientation: Orientation = orientation
        self.value_range = value_range
        self.device = torch.device(device)
        self._normalize = torch.tensor([self.mean, self.std], device=device)[:, None, :, None, None]

    def __repr__(self) -> str:
        height, width = self.img_size
        return f"FeatureExtractor({self.title}: {height} x {width} px, {self.embed_dim} features, {self.device})"

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) in pixels that its position tables are made for."""
        return self.backbone.img_size

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        """Pixels per patch (per position of the map)."""
        return self.backbone.patch_size

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    def prepare(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        size: Size | Literal["own"] | None = None,
        crop_pct: float = 0.875,
    ) -> Tensor:
        """Images, see `to_images`, as a normalized batch [n, C, h, w] on the device of the backbone.

        Args:
            size: (height, width), or one number for both; None: `img_size`. "own": not resized, all of one size.
            crop_pct: `size` as a part of the shorter side, as timm has it: 0.875 is 224 of 256.

        Raises:
            ValueError: an image cannot be read, or has other channels; with "own" also images of different sizes.
        """
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct {crop_pct}: expected a number above 0 and at most 1")
        arrays = to_images(images, self.in_chans, self.orientation, self.value_range)
        if not arrays:
            raise ValueError("no images")
        if size == "own":
            shapes = {array.shape[:2] for array in arrays}
            if len(shapes) > 1:
                raise ValueError(f'size="own" needs images of one size, got {sorted(shapes)}')
            batch = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
        else:
            size = self.img_size if size is None else (size, size) if isinstance(size, int) else size
            crop = CenterCrop(size, round(max(size) / crop_pct))
            batch = torch.stack([crop(array) for array in arrays])
        mean, std = self._normalize
        return (batch.to(self.device).float() / 255 - mean) / std

    @torch.no_grad()
    def features(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        size: Size | Literal["own"] | None = None,
        crop_pct: float = 0.875,
        patches: bool = False,
        batch_size: int = 64,
    ) -> ImageFeatures:
        """Features of images. `patches`: also the map of the patch tokens; the other arguments are those of `prepare`.

        Raises:
            ValueError: as `prepare`; or the backbone takes no images of this size, or gives no patches.
        """
        if patches and "patches" not in self.backbone.provides:
            raise ValueError(f"{self.title}: this backbone gives one vector per image, no patches")
        arrays = to_images(images, self.in_chans, self.orientation, self.value_range)
        parts = [
            self._batch(self.prepare(arrays[start : start + batch_size], size=size, crop_pct=crop_pct), patches)
            for start in range(0, max(len(arrays), 1), batch_size)
        ]
        pooled = torch.cat([part for part, _ in parts])
        maps = torch.cat([part for _, part in parts if part is not None]) if patches else None
        return ImageFeatures(pooled, pooled if self.backbone.class_token else None, maps)

    def _batch(self, x: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        """Pooled features and map of a prepared batch."""
        network = self.backbone
        if not patches:
            return network.forward_cls(x).float().cpu(), None
        tokens = network(x)
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        maps = tokens[:, network.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).float().cpu()
        pooled = tokens[:, 0] if network.class_token else network.forward_cls(x)
        return pooled.float().cpu(), maps

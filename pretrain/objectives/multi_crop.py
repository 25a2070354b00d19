"""Base class of objectives with crops of two sizes, with or without a teacher."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from pretrain.core.trainable import Batch
from pretrain.models.pictures import drawing
from pretrain.objectives.base import Objective
from pretrain.objectives.configs.multi_crop import CropsConfig

CropsT = TypeVar("CropsT", bound=CropsConfig, covariant=True)


class MultiCrop(Objective[CropsT]):
    """Batch: "global" [b, g, C, H, W]; with local crops "local" [b, n, C, h, w]; with drop path its uniform random
    numbers "drop_path" [b, g + n, depth, 2].
    """

    def crops(self, batch: Batch) -> list[Tensor]:
        """One tensor per resolution, ordered by crop: [g * b, C, H, W] and, if any, [n * b, C, h, w]."""
        expected = {"global": self.config.num_global, "local": self.config.local_crops_number}
        for name, count in expected.items():
            found = batch[name].shape[1] if name in batch else 0
            if found != count:
                raise ValueError(f"batch[{name!r}] holds {found} crops per image, the objective needs {count}")
        return [crop_after_crop(batch[name]) for name, count in expected.items() if count]

    def drop_path(self, batch: Batch) -> Tensor | None:
        """Uniform random numbers of the drop path, ordered by crop: [crops * b, depth, 2]."""
        return crop_after_crop(batch["drop_path"]) if "drop_path" in batch else None

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """The crops of the first images."""
        crops = {name: batch[name][:4] for name in ("global", "local") if name in batch}
        return {f"{name} crops": _sheet(views, mean=mean, std=std) for name, views in crops.items()}


def crop_after_crop(per_image: Tensor) -> Tensor:
    """[b, crops, ...] -> [crops * b, ...]: all images of the first crop, then of the second."""
    return per_image.transpose(0, 1).flatten(0, 1)


def by_crop(rows: Tensor, images: int) -> Tensor:
    """[crops * images, ...] -> [crops, images, ...]."""
    return rows.reshape(-1, images, *rows.shape[1:])


def _sheet(views: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    rgb = drawing.to_rgb(views.flatten(0, 1), mean=mean, std=std)
    return drawing.sheet(rgb.reshape(*views.shape[:2], *rgb.shape[1:]))

"""Configuration of SimMIM (Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling"). No torch here."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.values import Probability, Scale


class SimMIMConfig(ObjectiveSection):
    """Masked image modelling with mask tokens and a linear decoder (Xie et al. 2021)."""

    name: Literal["simmim"] = "simmim"
    mask_cell: Positive = Field(32, description="side of the masked squares, in pixels")
    mask_ratio: float = Field(0.6, gt=0, lt=1, description="fraction of cells masked, rounded up")
    crop_scale: Scale = Field((0.67, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "mask"})

    def num_masked(self, total: int) -> int:
        """Cells masked, of `total`."""
        return math.ceil(total * self.mask_ratio)

    def num_cells(self, size: tuple[int, int]) -> int:
        """Cells of an image of `size` (height, width) in pixels."""
        return (size[0] // self.mask_cell) * (size[1] // self.mask_cell)

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, one random number per cell, by whose order cells are masked, and those of the drop path."""
        image = ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip, interpolation="bilinear")
        noises = [Noise("mask_noise", (max(1, self.num_cells(model.size)),))]
        if model.drop_path_rate:
            noises.append(Noise("drop_path", (model.num_blocks, 2)))
        return [image, *noises]

    def problems(self, model: ModelShape) -> list[str]:
        found, cell, patch = scale_problems("crop_scale", self.crop_scale), self.mask_cell, model.patch_size
        if any(side % cell for side in model.size):
            near = max(1, round(max(model.size) / cell)) * cell
            found.append(
                f"objective.mask_cell: {cell} px do not tile an image of {model.size[0]} x {model.size[1]} px; "
                f"change it, or model.img_size to {near}"
            )
        if cell % patch and patch % cell:
            found.append(
                f"objective.mask_cell: {cell} px is neither a multiple of model.patch_size {patch} nor a divisor; "
                f"try {max(1, round(cell / patch)) * patch}"
            )
        total = self.num_cells(model.size)
        if not found and not 1 <= self.num_masked(total) < total:
            found.append(
                f"objective.mask_ratio: {self.mask_ratio} of {total} cells of {cell} px leaves "
                f"{total - self.num_masked(total)} visible; at least one must be visible: lower it or mask_cell"
            )
        return found

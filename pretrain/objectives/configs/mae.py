"""Configuration of MAE (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners"), and of its form in Pixio
(Yang et al. 2025, "In Pursuit of Pixel Supervision for Visual Pre-training"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import Probability, Scale


class MAEConfig(ObjectiveSection):
    """Masked autoencoder (He et al. 2021; Pixio: Yang et al. 2025)."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="fraction of patches that are masked")
    norm_pix_loss: bool = Field(True, description="normalize each target patch by its own mean and variance")
    decoder_embed_dim: Positive = 512
    decoder_depth: Positive = 8
    decoder_num_heads: Positive = 16
    mask_grid: Positive = Field(1, description="patches per side of the cells that are masked together; 4 in Pixio")
    positions: Literal["fixed", "learned"] = Field(
        "fixed", description="learned: those of encoder and decoder start random and are trained, as in Pixio"
    )
    registers_are_class_tokens: bool = Field(
        False, description="model.num_registers are further class tokens, as in Pixio: the decoder reads them too"
    )
    crop_scale: Scale = Field((0.2, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "class_token", "keep"})

    def num_keep(self, total: int) -> int:
        """Cells the encoder sees, of `total`."""
        return int(total * (1 - self.mask_ratio))

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, one random number per cell, by whose order cells are masked, and those of the drop path."""
        image = ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip)
        noises = [Noise("mask_noise", (self.num_cells(model),))]
        if model.drop_path_rate:
            noises.append(Noise("drop_path", (model.num_blocks, 2)))
        return [image, *noises]

    def num_cells(self, model: ModelShape) -> int:
        """Cells of an image: patches where `mask_grid` is 1."""
        rows, columns = patch_grid(model)
        return (rows // self.mask_grid) * (columns // self.mask_grid)

    def problems(self, model: ModelShape) -> list[str]:
        found, total = scale_problems("crop_scale", self.crop_scale), self.num_cells(model)
        (rows, columns), cells = patch_grid(model), "patches" if self.mask_grid == 1 else "cells"
        if rows % self.mask_grid or columns % self.mask_grid:
            found.append(
                f"objective.mask_grid: {self.mask_grid} does not divide the grid of {rows} x {columns} patches"
            )
        elif not 1 <= self.num_keep(total) < total:
            found.append(
                f"objective.mask_ratio: {self.mask_ratio} of {total} {cells} leaves {self.num_keep(total)} visible; "
                "at least one must be visible and one masked"
            )
        if self.registers_are_class_tokens and "own_blocks" not in model.provides:
            found.append(
                "objective.registers_are_class_tokens: needs our vision transformer (model.name: vit_base, ...)"
            )
        width, heads = self.decoder_embed_dim, self.decoder_num_heads
        if width % 4 or width % heads:
            found.append(
                f"objective.decoder_embed_dim: {width} is not a multiple of 4 and of decoder_num_heads {heads}"
            )
        return found

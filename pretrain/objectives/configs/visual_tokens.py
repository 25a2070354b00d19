"""Settings that BEiT and BEiT v2 share: tokenizer, its input images, block-wise masks. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.masks import BlockMask
from pretrain.data.views.specs import ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs import released
from pretrain.objectives.configs.checks import jitter_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, num_patches, patch_grid
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Strength, both_sides

TOKENIZERS = ("dvae", "vqkd")


class VisualTokensSection(ObjectiveSection):
    """Predict the visual tokens of masked patches."""

    tokenizer: str = Field(
        description="release folder of dvae or vqkd; or file of DALL-E's encoder or of official VQ-KD weights"
    )
    tokenizer_size: Positive | tuple[Positive, Positive] | None = Field(
        None, description="size of the tokenizer's input in pixels; default: the size with one token per patch"
    )
    num_masking_patches: Positive = Field(75, description="patches to mask; the default is for a 14 x 14 grid")
    min_mask_patches_per_block: Positive = 16
    max_mask_patches_per_block: Positive | None = Field(None, description="default: num_masking_patches")
    crop_scale: Scale = Field((0.08, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength, HueShift] = Field(
        (0.4, 0.4, 0.4, 0.0), description="brightness, contrast, saturation, hue; the last two need RGB"
    )

    tokenizer_interpolation: ClassVar[Literal["bicubic", "lanczos"]]
    exact_masks: ClassVar[bool]
    file_stride: ClassVar[int | None]  # pixels per token of a tokenizer file; None: the model's patch size

    def picture_size(self, grid: tuple[int, int], patch_size: int) -> tuple[int, int]:
        """(height, width) in pixels of the tokenizer's input, for a model of `grid` patches of `patch_size`."""
        if self.tokenizer_size is not None:
            return both_sides(self.tokenizer_size)
        found = released.facts(self.tokenizer)
        stride = (released.patch_size(found) if found else self.file_stride) or patch_size
        return grid[0] * stride, grid[1] * stride

    def noises(self, model: ModelShape) -> list[Noise]:
        """Random numbers of the drop path."""
        return [Noise("drop_path", (model.num_blocks, 2))] if model.drop_path_rate else []

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, the same at the tokenizer's size, the mask, and random numbers of the drop path."""
        jitter = ColorJitter(*self.color_jitter) if any(self.color_jitter) else None
        mask = BlockMask(
            "mask",
            patch_grid(model),
            num_masked=self.num_masking_patches,
            min_per_block=self.min_mask_patches_per_block,
            max_per_block=self.max_mask_patches_per_block,
            exact=self.exact_masks,
        )
        return [
            ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip, jitter=jitter),
            ViewSpec(
                "tokenizer_image",
                self.picture_size(patch_grid(model), model.patch_size),
                same_as="image",
                interpolation=self.tokenizer_interpolation,
                normalize=False,
            ),
            mask,
            *self.noises(model),
        ]

    def problems(self, model: ModelShape) -> list[str]:
        found, total = scale_problems("crop_scale", self.crop_scale), num_patches(model)
        if self.num_masking_patches >= total:
            found.append(
                f"objective.num_masking_patches: {self.num_masking_patches} of {total} patches leaves none visible; "
                f"the fraction of the paper gives about {round(total * 75 / 196)}"
            )
        most = self.max_mask_patches_per_block or self.num_masking_patches
        if self.min_mask_patches_per_block > min(most, self.num_masking_patches):
            found.append(
                f"objective.min_mask_patches_per_block: {self.min_mask_patches_per_block} is more than may be masked "
                f"({min(most, self.num_masking_patches)}); lower it"
            )
        found += jitter_problems(self.color_jitter, model)
        return found + self._tokenizer_problems(model)

    def _tokenizer_problems(self, model: ModelShape) -> list[str]:
        facts = released.facts(self.tokenizer)
        if facts is None:
            return []
        if (made_by := facts.get("objective")) not in TOKENIZERS:
            return [
                f"objective.tokenizer: {self.tokenizer} is a release of {made_by}, which makes no tokens; "
                f"give one of {' or '.join(TOKENIZERS)}"
            ]
        rows, columns = grid = patch_grid(model)
        found = released.grid_problems(
            "tokenizer", self.tokenizer, facts, grid, model.in_chans, fixed=made_by == "vqkd"
        )
        stride, size = released.patch_size(facts), self.picture_size(grid, model.patch_size)
        if not found and stride and size != (rows * stride, columns * stride):
            found.append(
                f"objective.tokenizer_size: {size[0]} x {size[1]} px give {size[0] / stride:g} x {size[1] / stride:g} "
                f"tokens of {stride} px, but the model has {rows} x {columns} patches; leave it out, or set "
                f"[{rows * stride}, {columns * stride}]"
            )
        return found

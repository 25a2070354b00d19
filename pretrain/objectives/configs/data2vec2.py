"""Configuration of data2vec 2.0 for images (Baevski et al. 2022b, "Efficient Self-supervised Learning with
Contextualized Target Representations for Vision, Speech and Language"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.masks import InverseBlockMask
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import mask_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, num_patches, patch_grid
from pretrain.objectives.configs.values import Probability, Scale


class Data2Vec2Config(ObjectiveSection):
    """Several masked views for each pass of the teacher (Baevski et al. 2022b)."""

    name: Literal["data2vec2"] = "data2vec2"
    clone_batch: Positive = Field(16, description="masked views of an image per pass of the teacher")
    mask_ratio: float = Field(0.8, gt=0, lt=1, description="fraction of patches that are masked")
    mask_length: Positive = Field(3, description="side of the square blocks that stay visible, in patches")
    mask_prob_adjust: float = Field(0.07, ge=0, description="added to the visible fraction to draw blocks")
    mask_noise_std: float = Field(0.01, ge=0, description="of the decoder's input noise at masked patches; 0: zeros")
    decoder_dim: Positive = 768
    decoder_layers: Positive = 6
    decoder_kernel: Positive = 3
    decoder_groups: Positive = 16
    average_top_k_layers: Positive = Field(10, description="last blocks of the teacher whose tokens are averaged")
    target_features: Literal["block", "ffn"] = Field("ffn", description="ffn: output of the feed-forward branch")
    target_norm: Literal["layer", "instance", "none"] = Field("instance", description="normalization of each layer")
    final_norm: Literal["layer", "instance", "none"] = Field("layer", description="normalization of their mean")
    loss_beta: float = Field(0.0, ge=0, description="beta of a smooth L1 loss; 0: squared error")
    loss_scale: float | None = Field(None, gt=0, description="factor of the loss; default: 1 / sqrt(channels)")
    cls_weight: float = Field(
        2.56,
        ge=0,
        description="weight of the class token's loss, a mean over views; the official cls_loss of 0.01 multiplies a "
        "sum over the 16 x 16 views of a GPU",
    )
    ema_start: Probability = Field(0.9998, description="EMA momentum at the start of its ramp")
    ema_end: Probability = 0.99999
    ema_anneal_steps: int = Field(100_000, ge=0, description="length of the ramp; 0: always ema_end")
    crop_scale: Scale = Field((0.2, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5

    has_teacher: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"patches", "keep", "layers", "own_blocks"})
    step_momenta: ClassVar[tuple[str, ...]] = ("ema_start", "ema_end")

    def num_visible(self, total: int) -> int:
        """Patches the encoder sees, of `total`."""
        return int(total * (1 - self.mask_ratio))

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, its masks, one random number per mask and patch for the decoder's noise, those of the drop path."""
        specs: list[InputSpec] = [
            ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip),
            self.mask(model),
            Noise("decoder_noise", (self.clone_batch, num_patches(model))),
        ]
        if model.drop_path_rate:
            specs.append(Noise("drop_path", (self.clone_batch, model.num_blocks, 2)))
        return specs

    def mask(self, model: ModelShape) -> InverseBlockMask:
        """Batch entry "mask"."""
        return InverseBlockMask(
            "mask",
            patch_grid(model),
            mask_ratio=self.mask_ratio,
            block=self.mask_length,
            adjust=self.mask_prob_adjust,
            count=self.clone_batch,
        )

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale)
        if self.average_top_k_layers > model.num_blocks:
            found.append(
                f"objective.average_top_k_layers: {self.average_top_k_layers} of a backbone with {model.num_blocks} "
                "blocks; at most that many"
            )
        if self.cls_weight and not model.class_token:
            found.append(
                f"objective.cls_weight: {self.cls_weight}, but model.class_token is false; set it to true, or the "
                "weight to 0"
            )
        for key in ("decoder_dim", "embed_dim"):
            width = self.decoder_dim if key == "decoder_dim" else model.embed_dim
            if width % self.decoder_groups:
                found.append(
                    f"objective.decoder_groups: {self.decoder_groups} does not divide {key} {width}; the decoder's "
                    "convolutions need equal groups"
                )
        if self.decoder_kernel % 2 == 0:
            found.append(f"objective.decoder_kernel: {self.decoder_kernel} is even; an odd one keeps the grid as it is")
        return found + mask_problems("mask_ratio", lambda: self.mask(model))

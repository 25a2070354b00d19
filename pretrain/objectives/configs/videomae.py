"""Configuration of VideoMAE (Tong et al. 2022, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for
Self-Supervised Video Pre-Training"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, num_patches
from pretrain.objectives.configs.values import Probability, Scale


class VideoMAEConfig(ObjectiveSection):
    """Masked autoencoder of clips (Tong et al. 2022)."""

    name: Literal["videomae"] = "videomae"
    mask_ratio: float = Field(0.9, gt=0, lt=1, description="fraction of patches that are masked, in every frame")
    norm_pix_loss: bool = Field(
        True, description="normalize each colour of a target tube by its own mean and standard deviation"
    )
    decoder_embed_dim: Positive = Field(384, description="in the paper half the width of the encoder")
    decoder_depth: Positive = 4
    decoder_num_heads: Positive = 6
    frame_stride: Positive = Field(
        4, description="distance between two frames of a clip, in frames of the sample; 4 on Kinetics, 2 on SSv2"
    )
    crop_scale: Scale = Field((0.4, 1.0), description="area of the crop as a fraction of the frame")
    hflip: Probability = Field(0.0, description="of the whole clip; it turns left into right")

    needs: ClassVar[frozenset[str]] = frozenset({"clip", "tubes", "keep"})

    def num_keep(self, patches: int) -> int:
        """Patches of each frame that the encoder sees, of `patches`."""
        return patches - int(self.mask_ratio * patches)

    def views(self, model: ModelShape) -> list[InputSpec]:
        """A clip, its pixels in [0, 1] for the target, a random number per patch, those of the drop path."""
        clip = ViewSpec(
            "clip",
            model.size,
            scale=self.crop_scale,
            hflip=self.hflip,
            frames=model.num_frames or 1,
            stride=self.frame_stride,
        )
        pixels = ViewSpec("pixels", model.size, normalize=False, same_as="clip")
        noises = [Noise("mask_noise", (num_patches(model),))]
        if model.drop_path_rate:
            noises.append(Noise("drop_path", (model.num_blocks, 2)))
        return [clip, pixels, *noises]

    def problems(self, model: ModelShape) -> list[str]:
        found, total = scale_problems("crop_scale", self.crop_scale), num_patches(model)
        if not 1 <= self.num_keep(total) < total:
            found.append(
                f"objective.mask_ratio: {self.mask_ratio} of {total} patches of a frame leaves {self.num_keep(total)} "
                "visible; at least one must be visible and one masked"
            )
        width, heads = self.decoder_embed_dim, self.decoder_num_heads
        if width % 2 or width % heads:
            found.append(f"objective.decoder_embed_dim: {width} is odd or no multiple of decoder_num_heads {heads}")
        return found

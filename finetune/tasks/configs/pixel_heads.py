"""Configuration of the heads that predict every pixel. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.queries import EoMTSection
from finetune.tasks.configs.values import Strength
from pretrain.core.configlib import Config, Positive

Rate = Annotated[float, Field(ge=0, lt=1)]


class LinearPixels(Config):
    """Batch norm and one 1 x 1 layer on the maps of one or more blocks (DINOv2, DINOv3)."""

    name: Literal["linear"] = "linear"
    dropout: Rate = Field(0.0, description="of channels, before the layer")

    maps: ClassVar[int | None] = None
    default_maps: ClassVar[int] = 1


class UPerNetPixels(Config):
    """UPerNet on four maps (Xiao et al. 2018)."""

    name: Literal["upernet"] = "upernet"
    width: Positive = Field(512, description="channels; 768 with ViT-B of MAE and BEiT")
    dropout: Rate = Field(0.1, description="of channels, before the classifier")
    auxiliary: Strength = Field(0.4, description="weight of the loss of a second head on the third map; 0: off")
    auxiliary_width: Positive = 256

    maps: ClassVar[int | None] = 4
    default_maps: ClassVar[int] = 4


class DPTPixels(Config):
    """DPT's decoder on four maps (Ranftl et al. 2021)."""

    name: Literal["dpt"] = "dpt"
    width: Positive = 256
    reassembled: tuple[Positive, Positive, Positive, Positive] = Field(
        (96, 192, 384, 768), description="channels of the pyramid built from a plain backbone's maps"
    )

    maps: ClassVar[int | None] = 4
    default_maps: ClassVar[int] = 4


class EoMTPixels(EoMTSection):
    """Masks of queries, summed to scores."""

    num_queries: Positive = Field(100, description="at least the number of classes in one image")

    maps: ClassVar[int | None] = 1
    default_maps: ClassVar[int] = 1


SegmentationHead = Annotated[LinearPixels | UPerNetPixels | DPTPixels | EoMTPixels, Field(discriminator="name")]
DepthHead = Annotated[LinearPixels | DPTPixels, Field(discriminator="name")]

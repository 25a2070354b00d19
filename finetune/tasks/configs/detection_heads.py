"""Configuration of the heads that detect objects. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.tasks.configs.queries import EoMTSection
from finetune.tasks.configs.values import Probability, Strength
from pretrain.core.configlib import Config, Positive

Factor = Annotated[float, Field(gt=0)]


class RCNNHead(Config):
    """Faster R-CNN, and Mask R-CNN, on a pyramid over the backbone; the defaults are ViTDet's."""

    name: Literal["mask_rcnn", "faster_rcnn"] = "mask_rcnn"
    cascade: bool = Field(False, description="three box heads, each refining the boxes of the previous one")
    channels: Positive = Field(256, description="of the pyramid and of the convolutions")
    scales: tuple[float, ...] = Field(
        (4, 2, 1, 0.5), min_length=1, description="of the pyramid's levels, relative to a plain backbone's map"
    )
    anchors: tuple[Factor, ...] | None = Field(
        None, description="sides in pixels, one per scale and one for the level above; default: 8 strides"
    )
    ratios: tuple[Factor, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width of the anchors")
    rpn_convs: Positive = 2
    rpn_batch: Positive = Field(256, description="anchors per image in training")
    before_nms: tuple[Positive, Positive] = Field(
        (2000, 1000), description="proposals per level, in training and inference"
    )
    proposals: tuple[Positive, Positive] = Field((1000, 1000), description="per image, in training and inference")
    roi_batch: Positive = Field(512, description="proposals per image on which the heads are trained")
    box_convs: int = Field(4, ge=0)
    box_fcs: Positive = 1
    box_dim: Positive = 1024
    mask_convs: Positive = 4
    norm: Literal["layer", "none"] = "layer"
    score_threshold: Probability = Field(0.05, description="lowest score of a detection")
    nms: Probability = Field(0.5, description="largest overlap (IoU) of a detection with a better one of its class")


class EoMTHead(EoMTSection):
    """A mask and a class from each query."""

    num_queries: Positive = 200


class DETRHead(Config):
    """Boxes from queries of a decoder over the backbone's last map (Carion et al. 2020 and successors)."""

    name: Literal["detr"] = "detr"
    num_queries: Positive = 300
    width: Positive = 256
    depth: Positive = 6
    num_heads: Positive = 8
    class_loss: Literal["focal", "ce"] = "focal"
    class_weight: Strength = 2.0
    l1_weight: Strength = 5.0
    giou_weight: Strength = 2.0


HeadConfig = Annotated[RCNNHead | EoMTHead | DETRHead, Field(discriminator="name")]

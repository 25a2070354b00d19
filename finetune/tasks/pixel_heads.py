"""One interface of the segmentation heads; heads that read maps are built here for depth too."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.maps.label_maps import VOID
from finetune.dense.contract import DenseBackbone
from finetune.heads.pixels.dense_parts import MapReader, resize, without_padding
from finetune.heads.pixels.dpt import DPT
from finetune.heads.pixels.linear_seg import LinearHead
from finetune.heads.pixels.upernet import AuxiliaryFCN, UPerNet
from finetune.heads.queries.eomt import EoMT
from finetune.heads.queries.mask_loss import MaskSetLoss, MaskTargets
from finetune.tasks.configs.pixel_heads import DPTPixels, EoMTPixels, LinearPixels, UPerNetPixels


class PixelHead(nn.Module):
    """Base of the adapters.

    Attributes:
        noises: shapes of the uniform random numbers per image that `losses` reads from the batch, by name.
        gives_logits: average the softmax of `scores` in inference; else the scores themselves.
        fixed_size_reason: why its graph accepts one image size only; None: it accepts any.
    """

    gives_logits = True
    fixed_size_reason: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.noises: dict[str, tuple[int, ...]] = {}

    def losses(
        self, dense: DenseBackbone, images: Tensor, target: Tensor, batch: dict[str, Any], fraction: float
    ) -> dict[str, Tensor]:
        """ "loss", and its terms detached.

        Args:
            images: [b, 3, H, W] normalized. target: labels int64 [b, H, W]. fraction: of the run that is done.
        """
        raise NotImplementedError

    def scores(self, dense: DenseBackbone, images: Tensor) -> Tensor:
        """[b, 3, H, W] normalized -> scores [b, K, h, w] of the classes, of any size."""
        raise NotImplementedError

    def prepare_export(self) -> None:
        """As `Task.prepare_export`."""


class MapPixels(PixelHead):
    """Linear, UPerNet and DPT: logits from maps, trained by the cross-entropy of every pixel."""

    def __init__(self, section: LinearPixels | UPerNetPixels | DPTPixels, dense: DenseBackbone, num_classes: int):
        super().__init__()
        self.reader = build_reader(section, dense, num_classes)
        self.fixed_size_reason = self.reader.fixed_size_reason
        self.auxiliary: AuxiliaryFCN | None = None
        self.weight = 0.0
        if isinstance(section, UPerNetPixels) and section.auxiliary:
            self.weight = section.auxiliary
            width, dropout = section.auxiliary_width, section.dropout
            self.auxiliary = AuxiliaryFCN(dense.channels[2], num_classes, width=width, dropout=dropout)
        for name, head in (("head_dropout", self.reader), ("auxiliary_dropout", self.auxiliary)):
            if head is not None and head.noise:
                self.noises[name] = (head.noise,)

    def losses(
        self, dense: DenseBackbone, images: Tensor, target: Tensor, batch: dict[str, Any], fraction: float
    ) -> dict[str, Tensor]:
        maps, size = dense(images, batch.get("drop")), target.shape[1:]
        stride = dense.strides[0]
        logits = resize(without_padding(self.reader(maps, batch.get("head_dropout")), size, stride), size)
        loss = pixel_loss(logits, target)
        known = target != VOID
        right = ((logits.argmax(1) == target) & known).sum() / known.sum().clamp(min=1)
        found = {"pixel_accuracy": right}
        if self.auxiliary is not None:
            other = self.auxiliary(maps[2], batch.get("auxiliary_dropout"))
            other = pixel_loss(resize(without_padding(other, size, dense.strides[2]), size), target)
            found |= {"head_loss": loss.detach(), "auxiliary_loss": other.detach()}
            loss = loss + self.weight * other
        return {"loss": loss, **found}

    def scores(self, dense: DenseBackbone, images: Tensor) -> Tensor:
        return without_padding(self.reader(dense(images)), images.shape[2:], dense.strides[0])


class QueryPixels(PixelHead):
    """EoMT: masks of queries, summed to scores."""

    gives_logits = False

    def __init__(self, section: EoMTPixels, dense: DenseBackbone, num_classes: int):
        super().__init__()
        loss = MaskSetLoss(num_classes, **section.loss_arguments())
        self.eomt = EoMT(dense.blockwise(), loss, **section.head_arguments())
        self.noises["queries"] = (self.eomt.noise,)

    def losses(
        self, dense: DenseBackbone, images: Tensor, target: Tensor, batch: dict[str, Any], fraction: float
    ) -> dict[str, Tensor]:
        masks = [MaskTargets.of_class_map(one, void=VOID) for one in target]
        uniforms, drop = batch["queries"], batch.get("drop")
        return self.eomt.losses(dense.blockwise(), images, masks, fraction=fraction, uniforms=uniforms, drop=drop)

    def scores(self, dense: DenseBackbone, images: Tensor) -> Tensor:
        return self.eomt.class_scores(dense.blockwise(), images)

    def prepare_export(self) -> None:
        self.eomt.stop_masking()


def build_head(section: Any, dense: DenseBackbone, num_classes: int) -> PixelHead:
    """The head of a `SegmentationHead` section on a dense backbone."""
    if isinstance(section, EoMTPixels):
        return QueryPixels(section, dense, num_classes)
    return MapPixels(section, dense, num_classes)


def build_reader(section: Any, dense: DenseBackbone, out_channels: int) -> MapReader:
    """The reader of a section of one of the heads that read maps."""
    channels, strides = dense.channels, dense.strides
    if isinstance(section, LinearPixels):
        return LinearHead(channels, out_channels, dropout=section.dropout)
    if isinstance(section, UPerNetPixels):
        return UPerNet(channels, strides, out_channels, width=section.width, dropout=section.dropout)
    return DPT(channels, strides, out_channels, width=section.width, reassembled=section.reassembled)


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits [b, K, h, w] for target int64 [b, h, w]: void pixels count as 0 in the mean over all.

    So a step does not depend on how its crops are divided over ranks. Computed in rows: torch's loss of maps has no
    deterministic implementation on a GPU.
    """
    rows = logits.float().permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(rows, target.flatten(), ignore_index=VOID, reduction="sum") / target.numel()

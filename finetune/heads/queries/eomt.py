"""Masks from a plain vision transformer itself: queries join its last blocks as further tokens.

EoMT (Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model"). In training, a query attends only to
the patches that its current mask covers; this masking is annealed to zero block by block, which leaves a plain ViT.
"""

from __future__ import annotations

import math

import torch
from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from finetune.dense.contract import BlockwiseBackbone
from finetune.heads.pixels.dense_parts import resize, without_padding
from finetune.heads.queries.mask_loss import MaskSetLoss, MaskTargets

_GOLDEN = (math.sqrt(5) - 1) / 2
_POWER = 0.9


class EoMT(nn.Module):
    """Queries, and the layers that predict classes and masks from them; the backbone is an argument of every call.

    Args:
        dense: the backbone of later calls; its last map must be that of the last block, normalized.
        loss: of the set of masks, with the number of classes.
        num_queries: largest number of objects (instances, or classes of a class map) in one image.
        num_blocks: number of the backbone's last blocks that process the queries.
        masked_attention: train with it; without it, only the output of the last block is supervised.

    Attributes:
        noise: uniform random numbers per image that `losses` reads.
        mask_probability: buffer [num_blocks], the share of queries whose attention is masked in each block; `losses`
            sets it by the progress of the run, and predictions use it.

    Raises:
        ValueError: the backbone does not fit, or has too few blocks.
    """

    mask_probability: Tensor

    def __init__(
        self,
        dense: BlockwiseBackbone,
        loss: MaskSetLoss,
        *,
        num_queries: int = 100,
        num_blocks: int = 4,
        masked_attention: bool = True,
    ):
        super().__init__()
        _check(dense, num_blocks)
        width = dense.embed_dim
        self.loss, self.num_queries, self.num_blocks = loss, num_queries, num_blocks
        self.masked_attention = masked_attention
        self.noise = 2 + num_blocks * num_queries
        self.queries = nn.Parameter(torch.randn(1, num_queries, width))
        self.classify = nn.Linear(width, loss.num_classes + 1)
        self.mask_mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        # Masks at about a quarter of the image's size, whatever the patch size.
        steps = max(1, round(math.log2(dense.patch_size)) - 2)
        self.upscale = nn.Sequential(*(_Upscale(width) for _ in range(steps)))
        self.register_buffer("mask_probability", torch.full((num_blocks,), float(masked_attention)))

    def forward(
        self, dense: BlockwiseBackbone, images: Tensor, *, drop: Tensor | None = None, uniforms: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Images [b, C, H, W] -> (mask logits [b, q, h, w], class logits [b, q, K + 1]) of every supervised block, the
        last of them the result. Class K is "no object"; h and w are a quarter of the image's, padded to whole patches.

        Args:
            drop: as in `DenseBackbone.forward`.
            uniforms: uniform random numbers [b, num_blocks, q]; attention is masked where they are below
                `mask_probability`. None: masked queries are evenly spread.
        """
        start = dense.depth - self.num_blocks
        x, grid = dense.prepare(images)
        x = dense.run(x, grid, 0, start, drop)
        x = torch.cat([self.queries.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        predictions = []
        for i, index in enumerate(range(start, dense.depth)):
            mask = None
            if self.masked_attention and (self.training or bool(self.mask_probability[i] > 0)):
                predictions.append(self._read(dense, x, grid))
                mask = self._attention_mask(predictions[-1][0], grid, x.shape[1], i, uniforms)
            now = None if drop is None else drop[:, index]
            x = dense.block(index, x, grid, extra=self.num_queries, drop=now, mask=mask)
        return [*predictions, self._read(dense, x, grid)]

    def losses(
        self,
        dense: BlockwiseBackbone,
        images: Tensor,
        targets: list[MaskTargets],
        *,
        fraction: float,
        uniforms: Tensor,
        drop: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ "loss"; its terms "mask", "dice" and "class" in the last block; "without_query", see `MaskSetLoss`; and
        "masked_attention", the share of queries that is masked.

        Args:
            targets: of each image, at its size. fraction: of the run that is done, in [0, 1]. uniforms: [b, noise].

        Raises:
            ValueError: a label is not one of the classes.
        """
        if self.masked_attention:
            self.mask_probability.copy_(torch.tensor(masked_share(fraction, self.num_blocks)))
        of_queries = uniforms[:, 2:].unflatten(1, (self.num_blocks, self.num_queries))
        predictions = self(dense, images, drop=drop, uniforms=of_queries)
        size = _size(images)
        predictions = [(without_padding(masks, size, dense.patch_size), classes) for masks, classes in predictions]
        return self.loss(predictions, targets, uniforms[:, :2]) | {"masked_attention": self.mask_probability.mean()}

    def class_scores(self, dense: BlockwiseBackbone, images: Tensor) -> Tensor:
        """Scores [b, K, H, W] of the classes at every pixel: over queries, the sum of class times mask probability.

        They do not sum to 1, and are averaged over windows, scales and mirrors without a softmax.
        """
        masks, classes = self.predict(dense, images)
        with torch.autocast(images.device.type, enabled=False):  # sums of many small products
            return torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], resize(masks, _size(images)).sigmoid())

    def predict(self, dense: BlockwiseBackbone, images: Tensor) -> tuple[Tensor, Tensor]:
        """The result: fp32 mask logits [b, q, h, w] that cover the images exactly, and class logits [b, q, K + 1]."""
        masks, classes = self(dense, images)[-1]
        return without_padding(masks.float(), _size(images), dense.patch_size), classes.float()

    def stop_masking(self) -> None:
        """Compute no attention mask any more, which changes nothing once masking has been annealed to zero.

        Raises:
            ValueError: attention is still masked at this point of the training.
        """
        if (self.mask_probability > 0).any():
            share = self.mask_probability.max().item()
            raise ValueError(
                f"head eomt still masks its attention ({share:.0%} in the last block), and a mask computed from the "
                "image cannot be in a graph. Export it at the end of its run, when masking has been annealed to zero"
            )
        self.masked_attention = False

    def _read(self, dense: BlockwiseBackbone, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = dense.normed(x)
        queries, tokens = x[:, : self.num_queries], x[:, self.num_queries :]
        pixels = self.upscale(dense.as_map(tokens, grid))
        return torch.einsum("bqd,bdhw->bqhw", self.mask_mlp(queries), pixels), self.classify(queries)

    def _attention_mask(
        self, logits: Tensor, grid: tuple[int, int], length: int, block: int, uniforms: Tensor | None
    ) -> Tensor:
        """bool [b, 1, T, T]: a masked query attends to the patches its mask covers, to queries and prefix tokens."""
        covered = (resize(logits.detach().float(), grid) > 0).flatten(2)
        if uniforms is None:
            spread = torch.arange(1, self.num_queries + 1, device=logits.device, dtype=torch.float64) * _GOLDEN % 1.0
            free = (spread >= self.mask_probability[block])[None, :, None]
        else:
            free = (uniforms[:, block] >= self.mask_probability[block])[..., None]
        mask = torch.ones(len(logits), length, length, dtype=torch.bool, device=logits.device)
        mask[:, : self.num_queries, length - covered.shape[2] :] = covered | free
        return mask[:, None]


def masked_share(fraction: float, num_blocks: int) -> list[float]:
    """The share of queries with masked attention in each block, when `fraction` of the run is done.

    Each block anneals it to zero within a sixth of the run, the first from 1/6 of it on, the last from 4/6; the last
    sixth is without it (the official configurations).
    """
    shares = []
    for block in range(num_blocks):
        start = 1 + 3 * block / max(num_blocks - 1, 1)
        shares.append((1.0 - min(max(fraction * 6 - start, 0.0), 1.0)) ** _POWER)
    return shares


class _Upscale(nn.Sequential):
    """A map of twice the size: transposed convolution, GELU, depthwise convolution, layer norm."""

    def __init__(self, width: int):
        super().__init__(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            LayerNorm2d(width),
        )


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def _check(dense: BlockwiseBackbone, num_blocks: int) -> None:
    if not 1 <= num_blocks <= dense.depth:
        raise ValueError(f"head eomt: num_blocks {num_blocks}, but the backbone has {dense.depth} blocks")
    if not dense.norm or dense.indices[-1] != dense.depth - 1:
        raise ValueError("head eomt reads the backbone's last block through its norm; build it with both")
    local = [] if dense.window is None else sorted(set(range(dense.depth)) - set(dense.global_blocks))
    local = [index for index in local if index >= dense.depth - num_blocks]
    if local:
        raise ValueError(f"head eomt: blocks {local} attend within windows, but the queries need complete images there")

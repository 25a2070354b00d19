"""What a dense backbone is, in types: images of any size to feature maps, whatever the backbone.

Shapes: b images of C channels and H x W pixels; P prefix tokens (class token, registers) and N patch tokens of width D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone

Grid = tuple[int, int]  # (rows, columns)


class DenseBackbone(nn.Module):
    """Images [b, C, H, W] -> feature maps, finest first.

    Attributes:
        backbone: the backbone, whose parameters keep their names; what the maps do not depend on is frozen.
        indices: numbers of the blocks or stages that the maps come from, ascending.
        channels, strides: of each map; strides in pixels.
        patch_size: pixels per side of a cell of the backbone's last map; images are padded with zeros, at the right and
            below, to multiples of it.
    """

    backbone: Backbone
    indices: tuple[int, ...]
    channels: list[int]
    strides: list[int]
    patch_size: int

    if TYPE_CHECKING:

        def __call__(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]: ...

    def forward(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """Images [b, C, H, W] -> maps [b, channels, ceil(H / stride), ceil(W / stride)].

        Args:
            drop: uniform random numbers [b, depth, 2] of our ViT's stochastic depth, which training with it needs;
                timm's models draw their own from torch's generator.
        """
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        """The width D of the backbone."""
        return self.backbone.embed_dim

    @property
    def depth(self) -> int:
        """The number of blocks of the backbone."""
        return self.backbone.depth

    def blockwise(self) -> BlockwiseBackbone:
        """This backbone, if it can be computed block by block.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(f"a {type(self).__name__} cannot be computed block by block: a plain ViT is needed")

    def covered(self, images: Tensor) -> tuple[int, int]:
        """(height, width) in pixels that the last map of images [b, C, H, W] covers, padding included."""
        stride = self.strides[-1]
        return -(-images.shape[2] // stride) * stride, -(-images.shape[3] // stride) * stride

    def padded(self, images: Tensor) -> Tensor:
        """Images [b, C, H, W] with zeros at the right and below, up to multiples of the patch size."""
        return F.pad(images, (0, -images.shape[3] % self.patch_size, 0, -images.shape[2] % self.patch_size))


class BlockwiseBackbone(DenseBackbone):
    """A plain vision transformer computed block by block, so that further tokens, such as queries, can join its own.

    Tokens are [b, extra + P + N, D]: further tokens without a position, prefix tokens, patches in row-major order.

    Attributes:
        norm: whether the maps go through the backbone's last norm.
        window: rows and columns of the windows in which local blocks attend; None: every block is global.
        global_blocks: numbers of the blocks that attend to the complete image.
    """

    norm: bool
    window: int | None
    global_blocks: tuple[int, ...]

    @property
    def num_prefix_tokens(self) -> int:
        """P, the number of class token and registers."""
        return self.backbone.num_prefix_tokens

    def blockwise(self) -> BlockwiseBackbone:
        return self

    def prepare(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [b, C, H, W] -> the tokens [b, P + N, D] before the first block, and the grid of the patches."""
        raise NotImplementedError

    def run(
        self, x: Tensor, grid: Grid, start: int, stop: int, drop: Tensor | None = None, *, extra: int = 0
    ) -> Tensor:
        """Tokens through the blocks from `start` to before `stop`, without a norm.

        Args:
            drop: as in `forward`. extra: number of further tokens.
        """
        raise NotImplementedError

    def block(
        self,
        index: int,
        x: Tensor,
        grid: Grid,
        *,
        extra: int = 0,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens through one block.

        Args:
            extra: number of further tokens. drop: uniform random numbers [b, 2] of this block.
            mask: bool [b, 1 or heads, T or 1, T], True where a token (third axis) may attend to another (fourth).

        Raises:
            ValueError: a mask for a block of windows.
        """
        raise NotImplementedError

    def normed(self, x: Tensor) -> Tensor:
        """Tokens through the backbone's last norm, if `norm`."""
        return self.backbone.trunk.norm(x) if self.norm else x

    def as_map(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The patches of tokens [b, P + N, D] as a map [b, D, rows, columns]."""
        return tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()

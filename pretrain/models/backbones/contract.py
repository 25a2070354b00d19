"""What a backbone is, in types: the base classes of `ViT`, `TimmBackbone` and the dVAE's `ConvEncoder`.

Shapes: b images of C channels and H x W pixels become P prefix tokens (class token, registers) and N patch tokens of
width D. What a given backbone can do is in `provides`, by the names that `families` explains; a method whose capability
is missing raises ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from pretrain.models.backbones.families import Provides
from pretrain.models.layers.pos_embed import PosResize


class ImageEncoder(nn.Module):
    """Images to tokens and to one vector each: all that a release or a probe reads.

    Attributes:
        img_size: (height, width) in pixels that it was built for. in_chans: C. embed_dim: D.
        patch_size: pixels per token and side; 1 where it gives no patch tokens. grid_size: (rows, columns) of them.
        class_token: whether the first token is one. num_prefix_tokens: P.
    """

    img_size: tuple[int, int]
    patch_size: int
    grid_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    class_token: bool
    num_prefix_tokens: int
    provides: Provides

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] -> normalized tokens [b, P + N, D], patches in row-major order."""
        raise NotImplementedError

    def forward_cls(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] -> one vector each, [b, D]: the class token, without one the mean of the patches."""
        raise NotImplementedError

    def last_attention(self, x: Tensor) -> Tensor | None:
        """The attention probabilities of the last block, fp32 [b, heads, P + N, P + N]; None: it does not give them."""
        del x
        return None

    def divide_block_outputs(self) -> None:
        """Divide the initial outputs of block i by sqrt(2 i), as BEiT, in a ViT with a learned position table (one with
        relative positions starts so); nothing changes in others."""

    def release_model(self) -> dict[str, Any]:
        """How a release rebuilds it: {"class": a name in `release.folder.BACKBONES`, **arguments of that class}."""
        raise NotImplementedError

    # Read by export

    resample_always: bool = False  # resample position tables for the trained grid too, while a graph is traced

    @property
    def title(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    def fixed_size_reason(self) -> str | None:
        """Why a traced graph of it accepts one image size only; None: it accepts any."""
        return f"{type(self).__name__} is built for one image size"


class Trunk(Protocol):
    """The module of a transformer that holds its blocks and its last norm."""

    blocks: nn.ModuleList
    norm: nn.Module


class Backbone(ImageEncoder):
    """What objectives train and fine-tuning starts from.

    Attributes:
        mask_dim: width of a mask token. depth: number of blocks; 1 where `layers` is not provided.
        num_heads, mlp_ratio: of the blocks, where `layers` is provided.
        blocks_prefix: what precedes the names of tokens and blocks in its state.
        pos_resize: how position tables are resampled; timm's models resample in their own way.

    Our ViT's methods take more, which is None if left out: moved coordinates, another last norm.
    """

    depth: int
    num_heads: int
    mlp_ratio: float
    mask_dim: int
    blocks_prefix: str
    pos_resize: PosResize = "exact"

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            keep: Tensor | None = None,
            drop: Tensor | None = None,
            mask: Tensor | None = None,
            mask_token: Tensor | None = None,
        ) -> Tensor: ...

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Images [b, C, H, W] -> normalized tokens [b, P + N, D].

        Args:
            keep: int64 [b, k]: encode only these patches (row-major index), in this order; k replaces N.
            drop: uniform random numbers [b, depth, 2] of the stochastic depth; timm's models draw their own.
            mask: bool [b, N]: these patches are replaced by `mask_token` [1, 1, mask_dim].
        """
        raise NotImplementedError

    def forward_cls(
        self,
        x: Tensor,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Images [b, C, H, W] -> one vector each, [b, D]: the class token, without one the mean of the patches."""
        raise NotImplementedError

    def layers(
        self,
        x: Tensor,
        indices: Sequence[int],
        *,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> list[Tensor]:
        """The tokens [b, P + N, D], before any norm, after each of the blocks `indices` (ascending from 0)."""
        raise NotImplementedError

    def intermediate(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalized tokens [b, P + N, D] after each of the last `n` blocks, in block order."""
        raise NotImplementedError

    @property
    def trunk(self) -> Trunk:
        """The module of its blocks and last norm, where `layers` is provided; `blocks_prefix` leads to it."""
        raise NotImplementedError

    def set_drop_path(self, rate: float, *, uniform: bool = False, subset: bool = False) -> None:
        """Stochastic depth rising linearly from 0 in the first block to `rate` in the last, or `uniform` in all.

        `subset`: choose the samples of a batch that compute a branch, instead of each sample's branches.
        """
        raise NotImplementedError

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        raise NotImplementedError

    def initialize_tokens(self, std: float) -> None:
        """Draw class token and registers anew, normal with this deviation; timm's models keep their initial values."""
        del std

    def train_positions(self, *, std: float | None = None) -> None:
        """Let a fixed sin-cos table be trained from now on, drawn anew from a normal distribution of this deviation if
        one is given; nothing changes where there is none."""

    # Read by fine-tuning

    @property
    def num_stages(self) -> int:
        """Number of blocks, or of stages in a hierarchical model, whose outputs can be feature maps."""
        return self.depth

    @property
    def drop_shape(self) -> tuple[int, ...] | None:
        """Shape of the uniform random numbers `drop` of one image, which training needs; None: it needs none."""
        return None

    def layer_numbers(self) -> tuple[dict[str, int], int]:
        """The layer of each parameter by name, and the number of the last layer, in hierarchical models.

        Raises:
            ValueError: the layers of a plain transformer are its blocks (`models.layer_decay`).
        """
        raise ValueError(f"{self.title}: its layers are its blocks")

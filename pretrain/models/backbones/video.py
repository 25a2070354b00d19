"""A vision transformer of clips: each token is a tube, a patch through several frames.

The blocks are those of `ViT`, with attention over space and time in one of three forms. Tubes are in the order time,
row, column, as if the grids of the frames stood one below another.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.backbones import families
from pretrain.models.backbones.vit import ViT
from pretrain.models.backbones.vit_positions import Given
from pretrain.models.layers import pos_embed as positions
from pretrain.models.layers.attention import Block
from pretrain.models.layers.initialize import initialize_linears
from pretrain.models.layers.mixer import NewMixer
from pretrain.models.layers.patches import gather_tubes
from pretrain.models.layers.pos_embed import PosKind
from pretrain.models.layers.space_time import DividedBlock, SpaceAttention, TimeAttention, causal_bias

POSITIONS: tuple[PosKind, ...] = ("sincos_flat", "learned", "none")


class TubeletEmbed(nn.Module):
    """Holds the projection of tubes, a strided 3-D convolution, by the name that it has in a ViT of images."""

    def __init__(self, tubelet_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)


class VideoViT(ViT):
    """Clips [b, T, C, H, W] to normalized tokens; images [b, C, H, W] are clips of equal frames.

    With `num_frames` and `tubelet_size` 1 it computes what a `ViT` with the same weights computes, bit for bit.

    Args:
        num_frames: T. tubelet_size: frames of a tube, of which T is a multiple.
        time_attention: "joint": all tokens; "divided": a branch over time, then attention over space; "block_causal":
            no patch sees a later time (`layers.space_time`).
        pos_embed: "sincos_flat": fixed, of the tube's number (VideoMAE, Tong et al. 2022); "learned"; "none".
        arguments: of `ViT`, without relative positions.

    Attributes:
        frame_grid: rows and columns of tubes at one time. slices: times. grid_size: (slices * rows, columns).

    Raises:
        ValueError: as `ViT`; or the frames are no multiple of the tube's, or the positions are of images.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        *,
        num_frames: int,
        tubelet_size: int = 2,
        time_attention: TimeAttention = "joint",
        pos_embed: PosKind = "sincos_flat",
        **arguments: Any,
    ):
        if pos_embed not in POSITIONS or arguments.get("rel_pos_bias", "none") != "none":
            raise ValueError(f"positions of clips are one of {', '.join(POSITIONS)}, without a relative bias")
        if num_frames % tubelet_size:
            raise ValueError(f"num_frames {num_frames} is not a multiple of tubelet_size {tubelet_size}")
        if time_attention == "divided" and arguments.get("attention"):
            raise ValueError("time_attention divided has attention of its own; leave other mechanisms out")
        # Known before the blocks are built.
        self.time_attention, self.slices = time_attention, num_frames // tubelet_size
        super().__init__(img_size, patch_size, pos_embed="none", **arguments)
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.frame_grid = self.grid_size
        self.grid_size = (self.slices * self.frame_grid[0], self.frame_grid[1])
        self.provides = families.vit_provides(class_token=self.class_token, attention=self.attention, clips=True)
        self.patch_embed = TubeletEmbed(tubelet_size, patch_size, self.in_chans, self.embed_dim)
        self.pos_kind = pos_embed
        if pos_embed == "none":
            return
        tubes = self.grid_size[0] * self.grid_size[1]
        table = torch.zeros(self.class_token + tubes, self.embed_dim)
        if pos_embed == "sincos_flat":
            initialize_linears(self.blocks, "xavier")  # as VideoMAE
            table[int(self.class_token) :] = positions.sincos_flat(self.embed_dim, tubes)
        else:
            nn.init.trunc_normal_(table, std=0.02)
        self.pos_embed = nn.Parameter(table[None], requires_grad=pos_embed == "learned")

    def pixels(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The pixels that become a token each, all or those of `keep`: [b, k, C, t, p, p]."""
        return gather_tubes(self._clip(x), self.tubelet_size, self.patch_size, keep)

    def position_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        """The position table [1, P + N, D] for the grids of all times, one below another; None: no table."""
        if self.pos_embed is None or grid_size == self.grid_size:
            return self.pos_embed
        return self.resized_table(self.pos_embed, self.frame_grid, (grid_size[0] // self.slices, grid_size[1]))

    def resized_table(self, table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """A table [1, P + slices * N, D] with the grid of every time resampled from `old` to `new`."""
        of_class, tubes = table.tensor_split([int(self.class_token)], dim=1)
        frames = tubes.unflatten(1, (self.slices, -1))[0]
        how = {"how": self.pos_resize, "offset": self.pos_offset}
        resized = [positions.resize(frame[None], old, new, **how) for frame in frames]
        return torch.cat([of_class, *resized], dim=1)

    def train_positions(self, *, std: float | None = None) -> None:
        if self.pos_embed is not None and self.pos_kind == "sincos_flat":
            if std is not None:
                nn.init.trunc_normal_(self.pos_embed, std=std)
            self.pos_embed.requires_grad_(True)
            self.pos_kind = "learned"

    def release_model(self) -> dict[str, Any]:
        of_clips = {"class": "video_vit", "num_frames": self.num_frames, "tubelet_size": self.tubelet_size}
        return super().release_model() | of_clips | {"time_attention": self.time_attention}

    def last_attention(self, x: Tensor) -> Tensor | None:
        return None if self.time_attention == "divided" else super().last_attention(x)

    def new_block(self, dim: int, num_heads: int, **arguments: Any) -> Block:
        if self.time_attention != "divided":
            return super().new_block(dim, num_heads, **arguments)
        return DividedBlock(dim, num_heads, slices=self.slices, **arguments)

    def _mixer(self, index: int) -> NewMixer:
        in_space = partial(SpaceAttention, slices=self.slices)
        return in_space if self.time_attention == "divided" else super()._mixer(index)

    def _given(self, x: Tensor, keep: Tensor | None, drop: Tensor | None, axes: Tensor | None = None) -> Given:
        given = super()._given(x, keep, drop, axes)
        if self.time_attention != "block_causal":
            return given
        return replace(given, biases=[causal_bias(given.layout, self.slices, x.device)] * self.depth)

    def fixed_size_reason(self) -> str | None:
        return "it reads clips"

    def _clip(self, x: Tensor) -> Tensor:
        return x if x.ndim == 5 else x[:, None].expand(-1, self.num_frames, -1, -1, -1)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        if x.ndim not in (4, 5) or x.shape[-3] != self.in_chans:
            raise ValueError(f"clips must be [b, T, {self.in_chans}, H, W], got {list(x.shape)}")
        if x.ndim == 5 and x.shape[1] != self.num_frames:
            raise ValueError(f"this model reads clips of {self.num_frames} frames, got {x.shape[1]}")
        return self.slices * (x.shape[-2] // self.patch_size), x.shape[-1] // self.patch_size

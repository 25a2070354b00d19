"""The vision transformer (Dosovitskiy et al. 2020) from timm's parts and with timm's parameter names.

Pretraining needs what timm's classes do not do: encode any subset of the patches, replace others by a mask token,
compute only the class token in the last block, take another size at every call, have registers together with a class
row in the position table; all of it with any of the positions (tables, relative bias, rotation) in one class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.backbones import families, vit_positions
from pretrain.models.backbones.contract import Backbone, Trunk
from pretrain.models.backbones.vit_positions import Given
from pretrain.models.backbones.vit_weights import divide_outputs, initialize_vit
from pretrain.models.layers import pos_embed as positions
from pretrain.models.layers import rel_pos
from pretrain.models.layers.attention import Attention, Block, Norm, new_norm
from pretrain.models.layers.ffn import FFN, SWIGLU_MULTIPLE, TOPK
from pretrain.models.layers.mixer import EVERY_TOKEN, Layout, NewMixer, QKVBias
from pretrain.models.layers.patches import gather_pixels, grid_of
from pretrain.models.layers.rope import Rope
from pretrain.models.mechanisms import placement, places, settings
from pretrain.models.mechanisms.settings import Placed

CLS_ONLY = slice(0, 1)
# Arguments that a release names only where they differ from these.
RARE = {"qk_scale": None, "proj_bias": True, "ffn_bias": True, "ffn_topk": TOPK, "pos_offset": positions.DINO_OFFSET}
RARE |= {"ffn_multiple": SWIGLU_MULTIPLE, "norm_layer": "layer"}


class ViT(Backbone):
    """Images to normalized tokens: the class token, the registers, the patches.

    Args:
        img_size: (height, width) in pixels of the position tables; for other sizes they are resampled.
        class_token: without one, `forward_cls` is the mean of the patches.
        num_registers: extra tokens without a position (Darcet et al. 2023).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 in the first (Huang et al. 2016).
        pos_embed: "sincos" (as MAE orders it) and "sincos_rows_first" (as MoCo v3 does) are fixed tables, kept in the
            state dict; "learned" is trained; "rope" rotates queries and keys (see `rope`); "none". It also decides how
            the weights start, see `initialize_vit`.
        pos_resize, pos_offset: how the table is resampled, see `pos_embed.resize`.
        rel_pos_bias: a relative-position bias (see `rel_pos`), one table for all blocks, one for each, or both.
        rope: arguments of `rope.Rope`, which `pos_embed` "rope" uses.
        qkv_bias, qk_scale, proj_bias, layer_scale, ffn, ffn_bias, ffn_topk, ffn_multiple, norm_layer, norm_eps: see
            `Block`.
        cls_norm: class token and registers have a last norm `cls_norm` of their own, apart from that of the patches.
        attention: entries of `mechanisms.settings`: mechanisms in place of the attention, or on the output of it, of
            the MLP or of the block.

    Attributes:
        all of these, and mask_dim (width of a mask token), grid_size (rows, columns), num_prefix_tokens (class token
        and registers), pos_kind and rel_pos_kind (`pos_embed` and `rel_pos_bias` as given), provides (see `families`),
        blocks_prefix (before the names of tokens and blocks in its state).

    Raises:
        ValueError: the image is smaller than a patch, the heads do not divide the width, or the width does not suit
            the positions.
    """

    blocks_prefix = ""
    norm: nn.Module

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        class_token: bool = True,
        num_registers: int = 0,
        drop_path_rate: float = 0.0,
        pos_embed: positions.PosKind = "sincos",
        pos_resize: positions.PosResize = "exact",
        pos_offset: float = positions.DINO_OFFSET,
        qkv_bias: QKVBias = True,
        rel_pos_bias: rel_pos.RelPosKind = "none",
        layer_scale: float | None = None,
        ffn: FFN = "mlp",
        norm_eps: float = 1e-6,
        qk_scale: float | None = None,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        ffn_topk: float = TOPK,
        ffn_multiple: int = SWIGLU_MULTIPLE,
        norm_layer: Norm = "layer",
        cls_norm: bool = False,
        rope: Mapping[str, Any] | None = None,
        attention: Sequence[Mapping[str, Any] | Placed] = (),
    ):
        super().__init__()
        self.attention = settings.parse_all(attention)
        if wrong := next(places.problems(self.attention, depth), None):
            raise ValueError(wrong)
        if rel_pos_bias != "none" or pos_embed == "rope":
            settings.refuse_relative(self.attention)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        if min(img_size) < patch_size:
            raise ValueError(f"img_size {img_size[0]} x {img_size[1]} is smaller than one patch of {patch_size} pixels")
        self.img_size, self.patch_size, self.in_chans = (img_size[0], img_size[1]), patch_size, in_chans
        self.embed_dim = self.mask_dim = embed_dim
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.depth, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.class_token, self.num_registers = class_token, num_registers
        self.num_prefix_tokens = class_token + num_registers
        self.pos_kind: positions.PosKind = pos_embed
        self.pos_resize: positions.PosResize = pos_resize
        self.pos_offset = pos_offset
        self.rel_pos_kind: rel_pos.RelPosKind = rel_pos_bias
        self.qkv_bias: QKVBias = qkv_bias
        self.layer_scale, self.norm_eps = layer_scale, norm_eps
        self.norm_layer: Norm = norm_layer
        self.rope, self.ffn_multiple = Rope(**rope or {}), ffn_multiple
        self.ffn: FFN = ffn
        self.qk_scale, self.proj_bias, self.ffn_bias, self.ffn_topk = qk_scale, proj_bias, ffn_bias, ffn_topk
        self.provides = families.vit_provides(class_token=class_token, attention=self.attention)
        self.checkpointing = False

        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        self.pos_embed = None
        if pos_embed not in ("rope", "none"):
            rows = class_token + self.grid_size[0] * self.grid_size[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim), requires_grad=pos_embed == "learned")
        self.rel_pos_bias = rel_pos.RelPosBias(self.grid_size, num_heads) if rel_pos_bias in rel_pos.SHARED else None
        self.blocks = nn.ModuleList(
            self.new_block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                layer_scale=layer_scale,
                ffn=ffn,
                norm_eps=norm_eps,
                norm_layer=norm_layer,
                ffn_multiple=ffn_multiple,
                rel_pos_grid=self.grid_size if rel_pos_bias in rel_pos.PER_BLOCK else None,
                qk_scale=qk_scale,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                ffn_topk=ffn_topk,
                mixer=self._mixer(i),
            )
            for i in range(depth)
        )
        self.set_drop_path(drop_path_rate)
        self.norm = new_norm(norm_layer, embed_dim, norm_eps)
        self.cls_norm = new_norm(norm_layer, embed_dim, norm_eps) if cls_norm else None
        initialize_vit(self)
        self.front = placement.front(self.attention, in_chans)
        placement.change_outputs(cast(Sequence[Block], self.blocks), self.attention, embed_dim)
        vit_positions.prepare(self)

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Tensor:
        """Images [b, C, H, W] -> normalized tokens [b, P + N, D], P = num_prefix_tokens.

        Args:
            keep: int64 [b, k]: encode only these patches (row-major index), in this order; k replaces N.
            drop: uniforms [b, depth, 2] that decide which branches a sample skips; training with drop path needs them.
            mask: bool [b, N]: these patches are replaced by `mask_token` [1, 1, D] before they get their positions.
            axes: offsets and factors of the coordinates that rotate, in each block [depth, 2, 2] (`rope.moved_axes`).
        """
        given = self._given(x, keep, drop, axes)
        return self._normed(self._run(self.prepare_tokens(x, keep, mask, mask_token), given, 0, self.depth))

    def forward_cls(
        self,
        x: Tensor,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        axes: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """Images [b, C, H, W] -> the normalized class token [b, D], equal to `forward(...)[:, 0]`; without a class
        token the mean of the normalized patches.

        The last block computes its query, projection and MLP for the class token only. `norm` takes the place of the
        class token's last norm.
        """
        if not self.class_token:
            tokens = self.forward(x, drop=drop, mask=mask, mask_token=mask_token, axes=axes)
            return tokens[:, self.num_prefix_tokens :].mean(1)
        given, last = self._given(x, None, drop, axes), self.depth - 1
        x = self._run(self.prepare_tokens(x, None, mask, mask_token), given, 0, last)
        return (norm or self.cls_norm or self.norm)(self._apply_block(last, x, given, CLS_ONLY))[:, 0]

    def layers(
        self,
        x: Tensor,
        indices: Sequence[int],
        *,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> list[Tensor]:
        """The raw tokens [b, P + N, D], before any norm, after each of the blocks `indices` (ascending from 0).

        No block beyond the last of them is computed; the other arguments are those of `forward`.

        Raises:
            ValueError: the indices do not ascend within the depth.
        """
        if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < self.depth:
            raise ValueError(f"indices must ascend within 0 to {self.depth - 1}, got {list(indices)}")
        given, outputs, start = self._given(x, keep, drop, axes), [], 0
        x = self.prepare_tokens(x, keep, mask, mask_token)
        for index in indices:
            x = self._run(x, given, start, index + 1)
            outputs.append(x)
            start = index + 1
        return outputs

    def intermediate(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalized tokens [b, P + N, D] after each of the last `n` blocks, in block order."""
        if not 1 <= n <= self.depth:
            raise ValueError(f"n must be between 1 and the depth {self.depth}, got {n}")
        return [self._normed(tokens) for tokens in self.layers(x, range(self.depth - n, self.depth))]

    def last_attention(self, x: Tensor) -> Tensor | None:
        block: Any = self.blocks[-1]
        if not isinstance(block.attn, Attention):
            return None
        given, last = self._given(x, None, None), self.depth - 1
        x = self._run(self.prepare_tokens(x), given, 0, last)
        return block.attn.probabilities(block.norm1(x), given.biases[last], given.rotations[last])

    @property
    def trunk(self) -> Trunk:
        return self

    def initialize_tokens(self, std: float) -> None:
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=std)

    def divide_block_outputs(self) -> None:
        if self.pos_kind == "learned" and self.rel_pos_kind == "none":
            divide_outputs(self)

    def train_positions(self, *, std: float | None = None) -> None:
        if self.pos_embed is not None and self.pos_kind.startswith("sincos"):
            if std is not None:
                nn.init.trunc_normal_(self.pos_embed, std=std)
            self.pos_embed.requires_grad_(True)
            self.pos_kind = "learned"

    @property
    def drop_shape(self) -> tuple[int, ...] | None:
        return (self.depth, 2) if any(block.drop_rate for block in cast(Sequence[Block], self.blocks)) else None

    def fixed_size_reason(self) -> str | None:
        if self.rel_pos_kind != "none":
            return "its relative-position tables are indexed for one grid"
        if self.pos_embed is not None and self.pos_resize.startswith("dino"):
            return "its positions are resampled by a scale factor, as DINO's are"
        return None

    def prepare_tokens(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Class token, registers and embedded patches with their positions, before the first block."""
        table = self.position_table(self._grid_of(x))
        x = x if self.front is None else self.front(x)
        pixels = self.pixels(x, keep)
        # A strided convolution as one product: only the kept patches are touched.
        projection = self.patch_embed.proj
        patches = F.linear(pixels.flatten(2), projection.weight.flatten(1), projection.bias)
        if mask is not None:
            assert mask_token is not None, "a mask needs its mask_token"
            hidden = mask if keep is None else mask.gather(1, keep)
            patches = torch.where(hidden[..., None], mask_token.to(patches.dtype), patches)
        if table is not None:
            rows = table[:, int(self.class_token) :]
            patches = patches + (rows if keep is None else rows[0][keep])
        prefix = []
        if self.cls_token is not None:
            prefix.append(self.cls_token if table is None else self.cls_token + table[:, :1])
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        return torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), patches], dim=1)

    def pixels(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The pixels that become a token each, all or those of `keep`: [b, k, C, p, p]."""
        return gather_pixels(x, self.patch_size, keep)

    def position_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        """The position table for a grid of patches, [1, 1 + N, D], without a class token [1, N, D]; None: no table."""
        if self.pos_embed is None:
            return None
        resize = positions.resample if self.resample_always else positions.resize
        return resize(self.pos_embed, self.grid_size, grid_size, how=self.pos_resize, offset=self.pos_offset)

    def release_model(self) -> dict[str, Any]:
        """What rebuilds it, see `release`: the arguments of this class, without drop path."""
        given = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token")
        given += ("num_registers", "pos_resize", "qkv_bias", "layer_scale", "ffn", "norm_eps")
        arguments = {"class": "vit", "img_size": list(self.img_size), **{name: getattr(self, name) for name in given}}
        arguments |= {name: getattr(self, name) for name, usual in RARE.items() if getattr(self, name) != usual}
        arguments |= {} if self.cls_norm is None else {"cls_norm": True}
        if self.rope != Rope():
            arguments["rope"] = asdict(self.rope)
        if self.attention:
            arguments["attention"] = [entry.arguments() for entry in self.attention]
        return arguments | {"pos_embed": self.pos_kind, "rel_pos_bias": self.rel_pos_kind}

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.checkpointing = enabled

    def set_drop_path(self, rate: float, *, uniform: bool = False, subset: bool = False) -> None:
        """Stochastic depth rising linearly from 0 in the first block to `rate` in the last, or `uniform` in all.

        `subset`: spend it by subset, not by sample (see `drop_path`).
        """
        for i, block in enumerate(cast(Sequence[Block], self.blocks)):
            block.drop_rate = rate if uniform else rate * i / max(self.depth - 1, 1)
            block.drop_subset = subset

    def _normed(self, tokens: Tensor) -> Tensor:
        if self.cls_norm is None:
            return self.norm(tokens)
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        return torch.cat([self.cls_norm(prefix), self.norm(patches)], dim=1)

    def new_block(self, dim: int, num_heads: int, **arguments: Any) -> Block:
        """A block, by the arguments of `Block`."""
        return Block(dim, num_heads, **arguments)

    def _mixer(self, index: int) -> NewMixer:
        """What builds the first branch of block `index`."""
        entry = places.mixer_of(self.attention, index, self.depth)
        return partial(placement.new_mixer, entry, prefix=self.num_prefix_tokens > 0)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be [b, {self.in_chans}, H, W], got {list(x.shape)}")
        return grid_of(x, self.patch_size)

    def _given(self, x: Tensor, keep: Tensor | None, drop: Tensor | None, axes: Tensor | None = None) -> Given:
        grid, tokens, drops = self._grid_of(x), None, [None] * self.depth
        if keep is not None:
            if "keep" not in self.provides:
                grid_kinds = settings.reading_grid(self.attention)
                raise ValueError(f"{grid_kinds} reads the grid of all patches; a part of them cannot be encoded alone")
            prefix = torch.arange(self.num_prefix_tokens, device=keep.device).expand(len(keep), -1)
            tokens = torch.cat([prefix, keep + self.num_prefix_tokens], dim=1)
        if drop is not None:
            drops = drop.unbind(1)
        elif self.training and any(block.drop_rate for block in cast(Sequence[Block], self.blocks)):
            raise ValueError(f"drop path in training needs its random numbers: drop [b, {self.depth}, 2]")
        layout = Layout(grid, self.num_prefix_tokens, keep)
        rotations = vit_positions.rotations(self, grid, tokens, axes)
        return Given(drops, vit_positions.biases(self, grid, tokens), rotations, layout)

    def _run(self, x: Tensor, given: Given, start: int, stop: int) -> Tensor:
        for index in range(start, stop):
            x = self._apply_block(index, x, given)
        return x

    def _apply_block(self, index: int, x: Tensor, given: Given, queries: slice = EVERY_TOKEN) -> Tensor:
        block = self.blocks[index]
        others = given.drops[index], given.biases[index], given.rotations[index], given.layout
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, queries, *others, use_reentrant=False))
        return block(x, queries, *others)

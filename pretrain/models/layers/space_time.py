"""Attention among the tubes of a clip in three forms: joint, divided into time and space, causal from time to time.

Divided: Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video Understanding?", section 3.
Block-causal: a time sees itself and those before it, as in the predictor of V-JEPA 2-AC (Assran et al. 2025).

Tokens are P prefix tokens, then patches of `slices` times, the grids of which stand one below another (`Layout.grid`).
Prefix tokens see everything; where order matters, patches do not see them, as they would carry the future back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import Attention, Block, attend, choose, new_norm
from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, refuse_positions

TimeAttention = Literal["joint", "divided", "block_causal"]


def places(layout: Layout, slices: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(time, place at its time) of the patches, int64 [1 or b, k] each."""
    total = layout.grid[0] * layout.grid[1]
    index = torch.arange(total, device=device)[None] if layout.keep is None else layout.keep
    return index // (total // slices), index % (total // slices)


def causal_bias(layout: Layout, slices: int, device: torch.device) -> Tensor:
    """Added to scores, 0 or -inf, [1 or b, 1, P + k, P + k]: a patch sees patches of its time and of earlier ones."""
    time, _ = places(layout, slices, device)
    seen = time[:, :, None] >= time[:, None, :]
    prefix = layout.num_prefix_tokens
    seen = nn.functional.pad(seen, (prefix, 0), value=False)  # no patch sees a prefix token
    return as_bias(nn.functional.pad(seen, (0, 0, prefix, 0), value=True))


def as_bias(seen: Tensor) -> Tensor:
    """bool [b, s, s], True where a query sees a key, to what is added to scores, [b, 1, s, s]."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))[:, None]


class SpaceAttention(Attention):
    """Attention of patches to those of their own time and to the prefix tokens, which attend to all tokens.

    Args:
        slices: number of times. others: as `Attention`.
    """

    def __init__(self, dim: int, num_heads: int, *, slices: int, **others: Any):
        super().__init__(dim, num_heads, **others)
        self.slices = slices

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        refuse_positions("attention in space", bias, rotation)
        assert layout is not None
        if self.slices == 1:
            return super().forward(x, queries)
        prefix = layout.num_prefix_tokens
        if layout.keep is not None or not self.fused_attn:  # probabilities are looked at
            time, _ = places(layout, self.slices, x.device)
            seen = nn.functional.pad(time[:, :, None] == time[:, None, :], (prefix, 0, prefix, 0), value=True)
            return super().forward(x, queries, as_bias(seen))
        q, k, v = self.split_heads(x)
        (first_q, q), (first_k, of_k), (first_v, of_v) = (t.tensor_split([prefix], dim=2) for t in (q, k, v))
        of_q = self._by_time(q)
        keys, values = (
            torch.cat([first.repeat_interleave(self.slices, dim=0), self._by_time(rest)], dim=2)
            for first, rest in ((first_k, of_k), (first_v, of_v))
        )
        out = attend(of_q, keys, values, kernel=choose(q.device, q.dtype, keys.shape[2]))
        out = out.unflatten(0, (len(x), self.slices)).transpose(1, 2).flatten(2, 3)
        if prefix:
            of_prefix = attend(first_q, k, v, kernel=choose(k.device, k.dtype, k.shape[2]))
            out = torch.cat([of_prefix, out], dim=2)
        return self.proj(out.transpose(1, 2).flatten(2)[:, queries])

    def _by_time(self, heads: Tensor) -> Tensor:
        """[b, h, slices * n, d] -> [b * slices, h, n, d]."""
        return heads.unflatten(2, (self.slices, -1)).transpose(1, 2).flatten(0, 1)


class FromZero(nn.Linear):
    """A layer whose outputs start at 0."""

    own_start = True

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DividedBlock(Block):
    """A block with a branch before it: x + fc(attention over time(norm(x))) of the patches.

    The last layer of the branch starts at 0, so that a network of images starts as it is (TimeSformer's code).

    Args:
        slices: number of times. others: as `Block`.
    """

    def __init__(self, dim: int, num_heads: int, *, slices: int, **others: Any):
        of_attention = {key: others[key] for key in ("qkv_bias", "qk_scale", "proj_bias") if key in others}
        super().__init__(dim, num_heads, **others)
        self.slices = slices
        self.time_norm = new_norm(others.get("norm_layer", "layer"), dim, others.get("norm_eps", 1e-6))
        self.time_attn = Attention(dim, num_heads, **of_attention)
        self.time_fc = FromZero(dim, dim)

    def forward(
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        drop: Tensor | None = None,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Tokens [b, P + k, D] -> [b, t, D]; arguments as `Block.forward`. The branch over time is never dropped."""
        assert layout is not None
        prefix, patches = x.tensor_split([layout.num_prefix_tokens], dim=1)
        patches = patches + self.time_fc(self._over_time(self.time_norm(patches), layout))
        return super().forward(torch.cat([prefix, patches], dim=1), queries, drop, bias, rotation, layout)

    def _over_time(self, patches: Tensor, layout: Layout) -> Tensor:
        """Attention of each patch to those of its place."""
        if layout.keep is not None:
            _, place = places(layout, self.slices, patches.device)
            return self.time_attn(patches, bias=as_bias(place[:, :, None] == place[:, None, :]))
        by_place = patches.unflatten(1, (self.slices, -1)).transpose(1, 2)
        mixed = self.time_attn(by_place.flatten(0, 1)).unflatten(0, by_place.shape[:2])
        return mixed.transpose(1, 2).flatten(1, 2)

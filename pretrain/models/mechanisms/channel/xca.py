"""Cross-covariance attention: the channels of a head attend to each other, not the tokens."""

from __future__ import annotations

from timm.models import xcit
from torch import Tensor

from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, Mixer, QKVBias, refuse_positions


class XCA(xcit.XCA, Mixer):
    """softmax(t k^^T q^) v over the d x d channels of each head (El-Nouby et al. 2021, eq. 3).

    q^ and k^ are queries and keys with unit norm over the tokens; t, one per head, starts at 1. The cost is linear in
    the tokens. Reads a set: any of the tokens in any order, class token and registers among them.

    Args:
        dim, num_heads: width and heads. qkv_bias: of queries, keys and values; "no_key" is refused, as the norm over
            the tokens makes a bias of the keys count.
        rel_pos_grid: must be None: channels have no relative positions.

    Raises:
        ValueError: one of these two.
    """

    no_decay = ("temperature",)

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: QKVBias = True, rel_pos_grid: tuple[int, int] | None = None
    ):
        if qkv_bias == "no_key":
            raise ValueError("XCA takes qkv_bias true or false, not no_key")
        if rel_pos_grid is not None:
            raise ValueError("XCA reads no relative positions")
        super().__init__(dim, num_heads, qkv_bias=qkv_bias)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Tokens [b, s, D] -> the mixed tokens of `queries` [b, t, D]; see `Mixer.forward`."""
        del layout
        refuse_positions("xca", bias, rotation)
        return super().forward(x)[:, queries]

"""Blocks whose tokens attend to others, never to each other."""

from __future__ import annotations

from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from pretrain.models.layers import drop_path
from pretrain.models.layers.attention import Norm, attend, choose, new_norm
from pretrain.models.layers.free_rope import FreeRope
from pretrain.models.layers.rope import rotate


class CrossAttention(nn.Module):
    """Multi-head attention of tokens [b, t, D] to a context [b, s, C], without biases; both are rotated by place."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, frequencies: tuple[float, float]):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.rope = FreeRope(dim // num_heads, frequencies)

    def forward(self, x: Tensor, context: Tensor, places: Tensor, context_places: Tensor) -> Tensor:
        """-> [b, t, D]. `places` [1, 1 or b, 1, t, 2] and `context_places` [1, 1 or b, 1, s, 2]: see `FreeRope`."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, self.rope(places)), rotate(k, self.rope(context_places))
        out = attend(q, k, v, kernel=choose(k.device, k.dtype, k.shape[2]))
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """A pre-norm block of cross-attention and an MLP without biases. The context has been normalized.

    The random numbers of its stochastic depth are arguments, as those of `attention.Block`.

    Attributes:
        drop_rate: of the stochastic depth. drop_subset: spend it by subset, not by sample.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        frequencies: tuple[float, float],
        mlp_ratio: float = 4.0,
        norm_layer: Norm = "rms",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = new_norm(norm_layer, dim, norm_eps)
        self.attn = CrossAttention(dim, context_dim, num_heads, frequencies)
        self.norm2 = new_norm(norm_layer, dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), bias=False)
        self.drop_rate, self.drop_subset = 0.0, False

    def forward(
        self, x: Tensor, context: Tensor, places: Tensor, context_places: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """Tokens [b, t, D], a context [b, s, C] and the places of both, as `CrossAttention` -> [b, t, D].

        Args:
            drop: uniform random numbers [b, 2]: for the attention, for the MLP.
        """
        drops = (None, None) if drop is None or not (self.training and self.drop_rate) else drop.unbind(1)
        if drops[0] is None or drops[1] is None:
            x = x + self.attn(self.norm1(x), context, places, context_places)
            return x + self.mlp(self.norm2(x))
        if not self.drop_subset:
            attended = self.attn(self.norm1(x), context, places, context_places)
            x = x + drop_path.survivors(attended, drops[0], self.drop_rate)
            return x + drop_path.survivors(self.mlp(self.norm2(x)), drops[1], self.drop_rate)
        first, second = (_first(uniform, self.drop_rate) for uniform in drops)
        given = (self.norm1(x[first]), context[first], _of(places, first), _of(context_places, first))
        x = drop_path.add_to_subset(x, self.attn(*given), first)
        return drop_path.add_to_subset(x, self.mlp(self.norm2(x[second])), second)


def _first(uniform: Tensor, rate: float) -> Tensor:
    """The samples of uniform numbers [b] that compute a branch, int64 [k]."""
    return uniform.topk(drop_path.subset_size(len(uniform), rate)).indices


def _of(places: Tensor, samples: Tensor) -> Tensor:
    return places if places.shape[1] == 1 else places[:, samples]

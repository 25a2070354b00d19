"""Multi-head self-attention with timm's parameter names and a kernel chosen by device, type and length.

Measured forward + backward, one CPU core: in fp32 `scaled_dot_product_attention` (SDPA) is even with plain products
below 128 tokens and 1.15 to 1.4 times faster above; in bf16 its CPU backward is 2.2 to 6 times slower, at every length.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from pretrain.models.layers import drop_path, rel_pos, rope
from pretrain.models.layers.ffn import FFN, SWIGLU_MULTIPLE, TOPK, build_ffn
from pretrain.models.layers.free_rope import FreeRope
from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, Mixer, NewMixer, QKVBias

Kernel = Literal["sdpa", "bmm"]
Norm = Literal["layer", "rms"]
# Root mean square norms neither centre nor shift (Zhang & Sennrich 2019).
NORMS: dict[Norm, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def choose(device: torch.device, dtype: torch.dtype, length: int) -> Kernel:
    """The faster exact kernel for keys of this device, type and number of tokens; in a graph that is exported one
    kernel for any number, since a graph keeps the branch of the size that it was traced at."""
    if device.type != "cpu" or torch.compiler.is_exporting():
        return "sdpa"
    return "sdpa" if dtype == torch.float32 and length >= 128 else "bmm"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, kernel: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q [b, h, t, d] and k, v [b, h, s, d] -> [b, h, t, d].

    `bias` is [1 or b, h, t, s].
    """
    bias = None if bias is None else bias.to(q.dtype)
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    b, h, t, d = q.shape
    # Contiguous operands, and no casts between the products: autocast would convert the probabilities needlessly.
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.reshape(b * h, -1, d) for x in (q * d**-0.5, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        if bias is not None:
            scores = (scores.unflatten(0, (b, h)) + bias).flatten(0, 1)
        return torch.bmm(scores.softmax(dim=-1), v).reshape(b, h, t, d)


def new_norm(kind: Norm, dim: int, eps: float) -> nn.Module:
    """A norm of tokens [..., D]."""
    return cast(Any, NORMS[kind])(dim, eps=eps)


class Attention(TimmAttention, Mixer):
    """timm's attention (qkv, proj), which can also compute a part of the tokens only.

    Args:
        qkv_bias: "no_key": biases of queries and values only, as parameters `q_bias` and `v_bias` (BEiT).
        rel_pos_grid: rows and columns of the patches of an own `relative_position_bias_table`; None: it has none. The
            caller computes the bias from it, as it knows which tokens are present.
        qk_scale: factor of the products of queries and keys; None: 1 / sqrt(channels of a head).
        proj_bias: bias of the last layer.

    Attributes:
        rope: turns coordinates into rotations, where its frequencies are weights; else rotations are given.
    """

    rope: FreeRope | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: QKVBias = True,
        rel_pos_grid: tuple[int, int] | None = None,
        qk_scale: float | None = None,
        proj_bias: bool = True,
    ):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias is True, proj_bias=proj_bias)
        self.rope = None
        self.sharpness = None if qk_scale is None else qk_scale * self.head_dim**0.5
        if qkv_bias == "no_key":
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.no_key = qkv_bias == "no_key"
        if rel_pos_grid is not None:
            self.relative_position_bias_table = rel_pos.new_table(rel_pos_grid, num_heads)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Tokens [b, s, D] -> the attended tokens of `queries` [b, t, D]; keys and values are always all of x.

        The arguments are those of `Mixer.forward`.
        """
        del layout
        q, k, v = self.split_heads(x, queries, rotation)
        if bias is not None and not isinstance(bias, Tensor):
            bias = bias(q)
        elif bias is not None and queries != EVERY_TOKEN:
            bias = bias[:, :, queries]
        if self.fused_attn:
            out = attend(q, k, v, bias, kernel=choose(k.device, k.dtype, k.shape[2]))
        else:  # timm's name for products whose probabilities pass `attn_drop`, where a hook sees them
            out = self.attn_drop(_probabilities(q, k, bias)).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))

    def split_heads(
        self, x: Tensor, queries: slice = EVERY_TOKEN, rotation: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, h, t, d], keys and values [b, h, s, d], for scores q k^T / sqrt(d)."""
        b, s, dim = x.shape
        weight, bias = self.qkv.weight, self._qkv_bias()
        if queries == EVERY_TOKEN:
            qkv = F.linear(x, weight, bias) if self.no_key else self.qkv(x)
            q, k, v = qkv.reshape(b, s, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
            q = F.linear(x[:, queries], weight[:dim], q_bias)
            kv = F.linear(x, weight[dim:], kv_bias).reshape(b, s, 2, self.num_heads, self.head_dim)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
            q = q.reshape(b, -1, self.num_heads, self.head_dim).transpose(1, 2)
        if rotation is not None:
            table: Tensor = rotation if self.rope is None else self.rope(rotation)
            q, k = rope.rotate(q, table[:, :, :, queries]), rope.rotate(k, table)
        if self.sharpness is not None:
            q = q * self.sharpness
        return q, k, v

    def probabilities(self, x: Tensor, bias: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        """The attention map [b, h, s, s] of tokens [b, s, D], in fp32."""
        q, k, _ = self.split_heads(x, rotation=rotation)
        return _probabilities(q, k, bias)

    def _qkv_bias(self) -> Tensor | None:
        if not self.no_key:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) in fp32, [b, h, t, s]."""
    scores = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias.float()).softmax(dim=-1)


class Block(TimmBlock):
    """timm's pre-norm block, which can compute only the tokens that are read afterwards.

    The random numbers of its stochastic depth are arguments (see `drop_path`).

    Args:
        layer_scale: initial value of the factors on both branches (Touvron et al. 2021); None: no factors.
        ffn: see `ffn.build_ffn`. ffn_bias: biases of its layers. ffn_topk: share of its units that "topk" keeps.
            ffn_multiple: of which the width of a SwiGLU is.
        norm_layer, norm_eps: of its two norms, see `NORMS`.
        qk_scale, proj_bias: see `Attention`.
        qkv_bias, rel_pos_grid: see `Attention`.
        mixer: builds the module in place of the attention, under its name `attn`.

    Attributes:
        drop_rate: of the stochastic depth. drop_subset: spend it by subset, not by sample.
        placed: mechanisms on the output of the attention ("attn"), of the MLP ("mlp") or of the block ("block");
            then all tokens are computed, whatever `queries`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: QKVBias = True,
        layer_scale: float | None = None,
        ffn: FFN = "mlp",
        ffn_bias: bool = True,
        ffn_topk: float = TOPK,
        ffn_multiple: int = SWIGLU_MULTIPLE,
        norm_layer: Norm = "layer",
        norm_eps: float = 1e-6,
        rel_pos_grid: tuple[int, int] | None = None,
        qk_scale: float | None = None,
        proj_bias: bool = True,
        mixer: NewMixer = Attention,
    ):
        norm: Any = partial(NORMS[norm_layer], eps=norm_eps)
        super().__init__(
            dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias is True, init_values=layer_scale, norm_layer=norm
        )
        only_attention: dict[str, Any] = {} if qk_scale is None else {"qk_scale": qk_scale}
        if not proj_bias:
            only_attention["proj_bias"] = False
        self.attn: Mixer = mixer(dim, num_heads, qkv_bias=qkv_bias, rel_pos_grid=rel_pos_grid, **only_attention)
        if ffn != "mlp" or not ffn_bias:
            hidden = int(dim * mlp_ratio)
            self.mlp = build_ffn(ffn, dim, hidden, bias=ffn_bias, topk=ffn_topk, multiple=ffn_multiple)
        self.drop_rate, self.drop_subset = 0.0, False
        self.placed: nn.ModuleDict | None = None

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        drop: Tensor | None = None,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Tokens [b, s, D] -> [b, t, D], exact for the tokens of `queries`; the others are not computed.

        Args:
            drop: uniform random numbers [b, 2]; in training, a sample whose number is below the drop rate skips the
                attention (first column), the MLP (second). Without it nothing is dropped.
            bias, rotation, layout: see `Mixer.forward`.
        """
        if self.placed is not None and queries != EVERY_TOKEN:
            return self(x, EVERY_TOKEN, drop, bias, rotation, layout)[:, queries]
        if self.drop_subset and self.training and self.drop_rate and drop is not None:
            return self._compute_subsets(x, queries, drop, bias, rotation, layout)
        attention, mlp = (None, None) if drop is None else drop.unbind(1)
        x = x[:, queries] + self._survivors(self._attended(x, queries, bias, rotation, layout), attention)
        return self._placed("block", x + self._survivors(self._fed(x, layout), mlp), layout)

    def _attended(
        self, x: Tensor, queries: slice, bias: Bias | None, rotation: Tensor | None, layout: Layout | None
    ) -> Tensor:
        return self.ls1(self._placed("attn", self.attn(self.norm1(x), queries, bias, rotation, layout), layout))

    def _fed(self, x: Tensor, layout: Layout | None) -> Tensor:
        return self.ls2(self._placed("mlp", self.mlp(self.norm2(x)), layout))

    def _placed(self, place: str, x: Tensor, layout: Layout | None) -> Tensor:
        if self.placed is None or place not in self.placed:
            return x
        for change in cast(Any, self.placed[place]).values():
            x = change.tokens(x, layout)
        return x

    def _survivors(self, branch: Tensor, uniform: Tensor | None) -> Tensor:
        if uniform is None or not self.training or self.drop_rate == 0:
            return branch
        return drop_path.survivors(branch, uniform, self.drop_rate)

    def _compute_subsets(
        self,
        x: Tensor,
        queries: slice,
        drop: Tensor,
        bias: Bias | None,
        rotation: Tensor | None,
        layout: Layout | None,
    ) -> Tensor:
        count = drop_path.subset_size(len(x), self.drop_rate)
        first, second = drop.topk(count, dim=0).indices.unbind(1)
        bias = bias[first] if isinstance(bias, Tensor) and len(bias) > 1 else bias
        rotation = rotation if rotation is None or rotation.shape[1] == 1 else rotation[:, first]
        part = None if layout is None else layout.of_samples(first)
        x = drop_path.add_to_subset(x[:, queries], self._attended(x[first], queries, bias, rotation, part), first)
        part = None if layout is None else layout.of_samples(second)
        x = drop_path.add_to_subset(x, self._fed(x[second], part), second)
        return self._placed("block", x, layout)

"""Mechanisms in place of the attention of a block, or beside it."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import Attention
from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, Mixer, refuse_positions
from pretrain.models.mechanisms import class_of
from pretrain.models.mechanisms.placebo import NextImage, of_next
from pretrain.models.mechanisms.placed import build_map, over_tokens
from pretrain.models.mechanisms.settings import NO_BRANCH, Placed

Choice = Literal["soft", "hard", "uniform"]


class MapMixer(Mixer):
    """A mechanism of maps in place of the attention: tokens -> mechanism -> projection.

    One that reads a set mixes class token and registers with the patches. One that reads the grid mixes the patches;
    class token and registers, which are on no grid, attend to all tokens in an attention of their own, as in XCiT
    (El-Nouby et al. 2021, section 3.4).

    Attributes:
        mechanism: of maps [b, dim, H, W]. prefix: the attention of class token and registers; None: there are none.
    """

    def __init__(self, given: Placed, dim: int, num_heads: int, *, prefix: bool, **of_attention: Any):
        super().__init__()
        self.kind, self.reads = given.kind, given.reads
        self.mechanism = build_map(given, dim)
        self.prefix = Attention(dim, num_heads, **of_attention) if prefix and self.reads == "grid" else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        refuse_positions(self.kind, bias, rotation)
        mixed = over_tokens(self.mechanism, x, layout, self.reads, self.kind)
        if self.prefix is not None and layout is not None:
            count = layout.num_prefix_tokens
            mixed = torch.cat([self.prefix(x, slice(0, count)), self.proj(mixed[:, count:])], dim=1)
            return mixed[:, queries]
        return self.proj(mixed[:, queries])


class Blend(Attention):
    """The attention with mechanisms beside it: A(x) + sum_k p_k(x) g_k (B_k(x) - A(x)).

    A is the attention with its own names, so that it starts from any vision transformer; B_k are mixers. g_k is a
    strength per channel that starts at 0: the block is then exactly A. p is softmax(W mean(x) + b) over the branches
    and "none", which adds nothing; W and b start at 0.

    Args:
        branches: the mixers B_k by name. none: how many shares of p are for no branch.
        choice: "soft": all branches are weighted; "hard": the likeliest one alone (straight-through gradients; in
            training with Gumbel noise from torch's generator, which the engine seeds by step and rank); "uniform":
            p is constant, the control without a choice.
        placebo: every image gets the shares of the next one of its batch.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        branches: dict[str, Mixer],
        none: int = 0,
        choice: Choice = "uniform",
        placebo: bool = False,
        **of_attention: Any,
    ):
        super().__init__(dim, num_heads, **of_attention)
        self.branches = nn.ModuleDict(branches)
        self.choice: Choice = choice
        self.placebo = placebo
        self.count = len(branches) + none
        self.strength = nn.Parameter(torch.zeros(len(branches), dim))
        self.router: Router | None = None if choice == "uniform" else Router(dim, self.count)

    def forward(
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        attended = super().forward(x, queries, bias, rotation)
        shares, out = self.shares(x), attended
        if self.placebo:
            shares = of_next(shares)
        for index, branch in enumerate(cast(Any, self.branches).values()):
            weight = shares[:, index, None, None] * self.strength[index]
            out = out + weight * (branch(x, queries, layout=layout) - attended)
        return out.to(attended.dtype)

    def shares(self, x: Tensor) -> Tensor:
        """p of tokens [b, s, D], fp32 [b, K]: the branches in their order, then "none", as often as it is given."""
        if self.router is None:
            return torch.full((x.shape[0], self.count), 1.0 / self.count, device=x.device)
        scores = self.router(x.float().mean(1))
        if self.choice == "soft":
            return scores.softmax(-1)
        if self.training:
            scores = scores - torch.empty_like(scores).exponential_().log()
        soft = scores.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + soft - soft.detach()


class Router(nn.Linear):
    """Scores of the branches, zero at the start: every branch has the same share."""

    own_start = True

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def build_mixer(given: Placed, dim: int, num_heads: int, *, prefix: bool, **of_attention: Any) -> Mixer:
    """What stands in place of the attention of a block by an entry of `model.attention`.

    Args:
        prefix: whether there are class token or registers. of_attention: see `Attention`.

    Raises:
        ValueError: it cannot be built for this width.
    """
    if given.alternatives:
        none = given.options["branches"].count(NO_BRANCH)
        branches = {b.kind: _branch(b, dim, num_heads, prefix) for b in given.alternatives}
        routed: dict[str, Any] = {"none": none, "choice": given.options["choice"], "placebo": given.placebo}
        return Blend(dim, num_heads, branches=branches, **routed, **of_attention)
    if given.start == "identity":
        branch = {given.kind: _branch(given, dim, num_heads, prefix)}
        return Blend(dim, num_heads, branches=branch, **of_attention)
    return _branch(given, dim, num_heads, prefix)


def _branch(given: Placed, dim: int, num_heads: int, prefix: bool) -> Mixer:
    found = class_of(given.kind)
    if issubclass(found, Mixer):
        mixer: Mixer = found(dim, num_heads, **given.options)
    else:
        mixer = MapMixer(given, dim, num_heads, prefix=prefix)
    return NextImage(mixer) if given.placebo else mixer

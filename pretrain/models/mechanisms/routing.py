"""What the routers of general blocks choose, and how strong their branches are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.mechanisms.mixers import Blend


class Routing:
    """Of one general block, over the images of some forward passes.

    Attributes:
        branches: their names, in the order of p; then "none", as often as p has a share for it.
        strengths: [B], mean size of g_k over channels.
        shares: p of each image, [n, K], of a hard choice before it; without a router [1, K], the same for all.
    """

    def __init__(self, block: Blend):
        self.branches = list(block.branches)
        self.is_hard = block.choice == "hard"
        self.branches += ["none"] * (block.count - len(self.branches))
        self.strengths = block.strength.detach().float().abs().mean(1)
        self.parts: list[Tensor] = []

    @property
    def shares(self) -> Tensor:
        return torch.cat(self.parts) if self.parts else torch.full((1, len(self.branches)), 1 / len(self.branches))

    @property
    def used(self) -> Tensor:
        """p |g| of each image, [n, B], by the p that evaluation uses: of a hard choice 0 or 1."""
        p = self.shares
        if self.is_hard:
            p = torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1.0)
        return p[:, : len(self.strengths)] * self.strengths.to(p)

    def numbers(self) -> dict[str, float]:
        """Per branch "p/NAME" (mean) and "use/NAME" (mean of p |g|); with a router "winner", the largest mean p, and
        "entropy", the mean over images over log K."""
        p = self.shares
        mean = p.mean(0)
        use = (mean[: len(self.strengths)] * self.strengths.to(mean)).tolist()
        found = {f"use/{name}": value for name, value in zip(self.branches, use, strict=False)}
        if not self.parts or p.shape[1] < 2:
            return found
        for name, value in zip(self.branches, mean.tolist(), strict=True):
            found[f"p/{name}"] = found.get(f"p/{name}", 0.0) + value
        entropy = -(p * p.clamp(min=1e-30).log()).sum(1).mean() / math.log(p.shape[1])
        return found | {"winner": float(mean.max()), "entropy": float(entropy)}


@contextmanager
def observed_routing(network: nn.Module) -> Iterator[dict[str, Routing]]:
    """Inside it, forward passes add to the `Routing` of each general block below `network`, and of each mixer beside
    the attention, by name."""
    found = {name: part for name, part in network.named_modules() if isinstance(part, Blend)}
    seen = {name: Routing(block) for name, block in found.items()}
    hooks = [_on_scores(block.router, seen[name]) for name, block in found.items() if block.router is not None]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _on_scores(router: nn.Module, routing: Routing) -> Any:
    def hook(_: nn.Module, __: Any, scores: Tensor) -> None:
        routing.parts.append(scores.detach().float().softmax(-1))

    return router.register_forward_hook(hook)

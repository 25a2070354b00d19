"""The hidden units of feed-forward networks: how many of them are active, and a penalty that makes them fewer.

Hoyer sparsity is of Hoyer 2004, eq. 5; its penalty the Hoyer square of Yang et al. 2020 (DeepHoyer), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import ConvMlp, GlobalResponseNormMlp, GluMlp, Mlp  # pyright: ignore[reportPrivateImportUsage]
from timm.layers.mlp import SwiGLU as TimmSwiGLU
from torch import Tensor, nn

from pretrain.models.layers.ffn import SquaredReLU, SwiGLU, TopK

PenaltyKind = Literal["l1", "hoyer"]
FEED_FORWARD = (Mlp, GluMlp, TimmSwiGLU, ConvMlp, GlobalResponseNormMlp, SwiGLU)
WITH_ZEROS = (nn.ReLU, nn.ReLU6, SquaredReLU, TopK)  # activations that give exact zeros
SMALL = 0.01  # of the layer's RMS: a unit of another activation below it is not active


def feed_forwards(network: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward networks below a module, by name: Fovea's and timm's."""
    return {name: part for name, part in network.named_modules() if isinstance(part, FEED_FORWARD)}


@dataclass(frozen=True)
class Sparsity:
    """Of the hidden units of one layer.

    Attributes:
        active: share of the units of a token that are active, mean over tokens. hoyer: 0 (all equal) to 1 (one is not
            0), mean over tokens. dead: share of the units that no token activated. images: how many were seen.
    """

    active: float
    hoyer: float
    dead: float
    images: int


class Activity:
    """Sums over the hidden units of one feed-forward network, from which `sparsity` is computed.

    A unit is active where it is not 0, with activations that give zeros (ReLU, its square, top-k); else where its size
    is above 1 % of the root mean square of all units of the layer in the batch.
    """

    def __init__(self, ffn: nn.Module):
        self.has_zeros = isinstance(getattr(ffn, "act", None), WITH_ZEROS)
        self.images = self.tokens = 0
        self.active = self.hoyer = 0.0
        self.alive: Tensor | None = None

    def __call__(self, units: Tensor) -> None:
        """Add a batch [b, ..., units]."""
        sizes = units.detach().float().abs()
        rows = sizes.flatten(0, -2)
        threshold = 0.0 if self.has_zeros else SMALL * float(rows.square().mean().sqrt())
        is_active, n = rows > threshold, rows.shape[-1]
        self.images += len(units)
        self.tokens += len(rows)
        self.active += float(is_active.double().mean(-1).sum())
        lengths = rows.norm(dim=-1)
        ratio = torch.where(lengths > 0, rows.sum(-1) / lengths.clamp(min=1e-30), 1.0)
        self.hoyer += float(((math.sqrt(n) - ratio) / max(math.sqrt(n) - 1, 1e-30)).double().sum())
        alive = is_active.any(0)
        self.alive = alive if self.alive is None else self.alive | alive

    @property
    def sparsity(self) -> Sparsity:
        assert self.alive is not None, "no forward pass has come through this feed-forward network"
        dead = 1 - float(self.alive.double().mean())
        return Sparsity(self.active / self.tokens, self.hoyer / self.tokens, dead, self.images)


@contextmanager
def observed(network: nn.Module) -> Iterator[dict[str, Activity]]:
    """Inside it, forward passes add to the `Activity` of each feed-forward network below `network`, by name."""
    found = feed_forwards(network)
    seen = {name: Activity(ffn) for name, ffn in found.items()}
    hooks = [_on_units(ffn, seen[name]) for name, ffn in found.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def l1(units: Tensor) -> Tensor:
    """Mean size of the units [..., n] of a token, fp32 [...]."""
    return units.abs().sum(-1, dtype=torch.float32) / units.shape[-1]


def hoyer_square(units: Tensor) -> Tensor:
    """(sum |a|)^2 / (n sum a^2) of the units [..., n] of a token, fp32 [...]: 1/n (one is not 0) to 1 (all equal)."""
    total = units.abs().sum(-1, dtype=torch.float32)
    squares = units.square().sum(-1, dtype=torch.float32)
    return total.square() / (units.shape[-1] * squares).clamp(min=1e-12)


PENALTIES: Mapping[PenaltyKind, Callable[[Tensor], Tensor]] = {"l1": l1, "hoyer": hoyer_square}


class ActivationPenalty:
    """Gathers the penalty of hidden units during forward passes that have gradients.

    Its terms are part of the graph of the pass, also where blocks are recomputed: the recomputation, outside of
    `gathered`, runs the same operations and adds nothing.

    Args:
        ffns: by name, those with the penalty.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, ffns: Mapping[str, nn.Module], kind: PenaltyKind):
        if not ffns:
            raise ValueError("the backbone has no feed-forward network whose activations could be penalized")
        self.names, self._of = list(ffns), PENALTIES[kind]
        self._terms: dict[str, tuple[Tensor, int]] | None = None
        for name, ffn in ffns.items():
            _on_units(ffn, partial(self._add, name))

    @contextmanager
    def gathered(self) -> Iterator[dict[str, tuple[Tensor, int]]]:
        """By network: the sum over its tokens in all calls inside, and the number of tokens."""
        self._terms = {}
        try:
            yield self._terms
        finally:
            self._terms = None

    def _add(self, name: str, units: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        each = self._of(units)
        total = each.sum()
        if self._terms is not None:
            before, count = self._terms.get(name, (0.0, 0))
            self._terms[name] = (before + total, count + each.numel())


def _on_units(ffn: Any, see: Callable[[Tensor], None]) -> Any:
    """Call `see` with the hidden units [b, ..., n] of every forward pass: the input of the last layer."""
    is_map = isinstance(ffn.fc2, nn.Conv2d)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0].movedim(1, -1) if is_map else inputs[0])

    return ffn.fc2.register_forward_pre_hook(hook)

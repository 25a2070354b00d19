"""Measurements of a network for the doctor: feature rank and spread, attention entropy, sparsity of activations and
attention, choices of routers, distances, gradient norms.

RankMe is of Garrido et al. 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised
representations by their rank", eq. 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)

from pretrain.models.activations import observed
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.explain.recording import recorded_attention
from pretrain.models.explain.sparsity import tokens_for_mass
from pretrain.models.mechanisms.routing import observed_routing

_BLOCK = re.compile(r"^(.*?\bblocks\.\d+)\.")
_EPS = 1e-7


def rank_me(features: Tensor) -> float:
    """exp of the entropy of the singular values of features [n, D], each divided by their sum: 1 to min(n, D).

    Computed from the n x n products in fp64, which keeps values down to 1e-8 of the largest.
    """
    rows = features.double()
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) + _EPS
    return math.exp(float(-(shares * shares.log()).sum()))


def spreads(features: Tensor) -> dict[str, float]:
    """Of L2-normalized features [n, D]: smallest, median and largest standard deviation of a dimension, times sqrt(D).

    Features in random directions have 1 in each dimension; identical features have 0.
    """
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    each = rows.std(0, correction=0) * math.sqrt(rows.shape[1])
    return {"std_min": float(each.min()), "std_median": float(each.median()), "std_max": float(each.max())}


def attention_entropy(attention: Tensor, *, class_token: bool) -> float:
    """Mean entropy of attention rows [b, heads, T, T], divided by log T. 0: attention to one token, 1: uniform.

    Of the row of the class token if there is one, else of all rows.
    """
    rows = attention[:, :, 0] if class_token else attention.flatten(1, 2)
    rows = rows.double()
    entropy = -(rows * rows.clamp(min=torch.finfo(torch.float64).tiny).log()).sum(-1).mean()
    return float(entropy) / math.log(rows.shape[-1])


@torch.no_grad()
def layer_measures(network: ImageEncoder, images: Tensor) -> dict[str, float]:
    """Of each layer, from one forward pass of images [b, C, H, W], by the name of the layer.

    "active/", "hoyer/" and "dead/" of feed-forward networks (`models.activations`); "keys_90/": share of the keys that
    hold 90 % of a query's attention; "router/" of general blocks (`models.mechanisms.routing`).
    """
    with observed(network) as activity, observed_routing(network) as routing, ExitStack() as stack:
        keys: dict[str, Tensor] = {}
        with suppress(ValueError):  # it has no attention
            keys = stack.enter_context(recorded_attention(network, tokens_for_mass))
        if network.provides & {"patches", "tubes"}:
            network(images)
        else:
            network.forward_cls(images)
        found = {f"keys_90/{name}": float(share) for name, share in keys.items()}
    for name, of in activity.items():
        if of.tokens:
            sparsity = of.sparsity
            found |= {f"active/{name}": sparsity.active, f"hoyer/{name}": sparsity.hoyer, f"dead/{name}": sparsity.dead}
    for name, of in routing.items():
        found |= {f"router/{name}/{key}": value for key, value in of.numbers().items()}
    return found


def block_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """Gradient norm of each block from those of its parameters: {"encoder.blocks.0": 0.3}."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        found = _BLOCK.match(name)
        if found:
            squares[found.group(1)] = squares.get(found.group(1), 0.0) + norm * norm
    return {block: math.sqrt(square) for block, square in squares.items()}


class WeightSamples:
    """Values at fixed positions of weight matrices, to measure their change: up to 16 tensors, 1024 values each.

    Args:
        tensors: by name; vectors and scalars are skipped, as they often start at 0.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1 and tensor.numel() > 1]
        chosen = matrices[:: max(1, -(-len(matrices) // 16))]
        self._parts = [(tensor, max(1, tensor.numel() // 1024)) for tensor in chosen]
        self._last = self._read()

    def change(self) -> list[float]:
        """|now - previous| / |previous| of each matrix that was not 0 before; stores the current values as previous."""
        if not self._parts:
            return []
        before, now = self._last, self._read()
        self._last = now
        lengths = torch.stack([part.norm() for part in before])
        moved = torch.stack([(a - b).norm() for a, b in zip(now, before, strict=True)])
        return (moved / lengths)[lengths > 0].tolist()

    def _read(self) -> list[Tensor]:
        return [tensor.detach().flatten()[::stride][:1024].float().clone() for tensor, stride in self._parts]


def average_distance(averages: Sequence[tuple[Any, nn.Module]]) -> float | None:
    """|average - source| / |source| over all parameters that have an average; None if there is none."""
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    for ema, source in averages:
        held = dict(ema.average.named_buffers())
        for name, parameter in source.named_parameters():
            if name in held and held[name].shape == parameter.shape:
                mine.append(held[name])
                theirs.append(parameter.detach().float())
    if not mine:
        return None
    apart = torch.stack(_foreach_norm([a - b for a, b in zip(mine, theirs, strict=True)])).norm()
    return float(apart / torch.stack(_foreach_norm(theirs)).norm().clamp(min=1e-30))

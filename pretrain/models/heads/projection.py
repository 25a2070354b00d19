"""Projection heads of self-distillation and of contrastive learning."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers.initialize import initialize_linears

Act = Literal["gelu", "relu"]
Norm = Literal["none", "bn", "ln"]


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are weight_v / |weight_v| * weight_g (Salimans & Kingma 2016).

    Parameters: weight_g [K, 1], fixed at 1 when `unit_length`; weight_v [K, D]. With `linear` there is no weight_g and
    the rows are weight_v (DINOv3), which starts as a truncated normal of 0.02.
    """

    weight_g: nn.Parameter | None

    def __init__(self, dim: int, num_prototypes: int, *, unit_length: bool, linear: bool = False):
        super().__init__()
        if linear:
            self.register_parameter("weight_g", None)
            self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_prototypes, dim), std=0.02))
            return
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not unit_length)
        self.weight_v = nn.Parameter(nn.Linear(dim, num_prototypes, bias=False).weight.detach())

    def weight(self) -> Tensor:
        """The effective weight, fp32 [K, D]."""
        v = self.weight_v.float()
        if self.weight_g is None:
            return v
        return v * (self.weight_g.float() / torch.linalg.vector_norm(v, dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """[b, D] -> [b, K]."""
        return F.linear(x, self.weight())

    @torch.no_grad()
    def sum_of_logits(self, x: Tensor) -> Tensor:
        """Sum over rows of the logits of x [n, D], fp32 [K], computed as the logits of the sum."""
        with torch.autocast(x.device.type, enabled=False):
            return self.weight() @ x.float().sum(dim=0)


class DINOHead(nn.Module):
    """MLP to an L2-normalized bottleneck, then prototypes: features [b, in_dim] -> logits [b, out_dim].

    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.2, appendix C.

    Args:
        nlayers: linear layers of the MLP; with 1 there is no hidden layer.
        use_bn: BatchNorm after each hidden layer. mlp_bias: biases of the linear layers.
        act: after each hidden layer. same_norm: one norm, with the same weights after every hidden layer (iBOT).
        norm_last_layer: fix the prototypes at length 1. linear: prototypes of any length, a plain linear layer.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        mlp_bias: bool = True,
        act: Act = "gelu",
        same_norm: nn.Module | None = None,
        norm_last_layer: bool = True,
        linear: bool = False,
    ):
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers must be at least 1, got {nlayers}")
        layers: list[nn.Module] = []
        for i in range(nlayers - 1):
            layers.append(nn.Linear(in_dim if i == 0 else hidden_dim, hidden_dim, bias=mlp_bias))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            if same_norm is not None:
                layers.append(_FirstNormAgain() if i else same_norm)
            layers.append(nn.GELU() if act == "gelu" else nn.ReLU())
        last = nn.Linear(hidden_dim if layers else in_dim, bottleneck_dim, bias=mlp_bias)
        # Names as in the official weights: mlp.0, mlp.2, ...; mlp for a single layer.
        self.mlp = nn.Sequential(*layers, last) if layers else last
        self.last_layer = Prototypes(bottleneck_dim, out_dim, unit_length=norm_last_layer, linear=linear)
        initialize_linears(self.mlp, "trunc_normal")

    def bottleneck(self, x: Tensor) -> Tensor:
        """Features [b, in_dim] -> fp32 vectors of length 1 [b, bottleneck_dim]."""
        layers: Any = self.mlp if isinstance(self.mlp, nn.Sequential) else [self.mlp]
        for layer in layers:
            x = layers[1](x) if isinstance(layer, _FirstNormAgain) else layer(x)
        return F.normalize(x.float(), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(x))


class IBOTHead(DINOHead):
    """A head for class tokens and patches: one MLP, and separate prototypes for patches unless `shared`.

    Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", section 3.2.

    Args:
        patch_out_dim: prototypes of the patches; equal to `out_dim` when shared.
        shared: patches use the prototypes of the class token.
        norm: after every hidden layer, with the same weights, as in the official code.

    Raises:
        ValueError: `shared`, with different numbers of prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int,
        shared: bool,
        hidden_dim: int,
        norm: Norm = "none",
        **others: Any,
    ):
        kind = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm}.get(norm)
        same_norm = None if kind is None else kind(hidden_dim)
        super().__init__(in_dim, out_dim, hidden_dim=hidden_dim, same_norm=same_norm, **others)
        self.shared, self.couples_rows = shared, norm == "bn"
        if shared and patch_out_dim != out_dim:
            raise ValueError(f"a shared head has {out_dim} prototypes for both, but patch_out_dim is {patch_out_dim}")
        if not shared:
            bottleneck_dim = self.last_layer.weight_v.shape[1]
            unit_length = self.last_layer.weight_g is not None and not self.last_layer.weight_g.requires_grad
            self.last_layer2 = Prototypes(bottleneck_dim, patch_out_dim, unit_length=unit_length)

    def for_teacher(self, *, shared: bool) -> IBOTHead:
        """A copy with or without shared prototypes; if the copy alone shares them, they are the patch prototypes."""
        head = copy.deepcopy(self)
        if shared and not self.shared:
            head.last_layer = head.last_layer2
            del head.last_layer2
        elif self.shared and not shared:
            head.last_layer2 = copy.deepcopy(head.last_layer)
        head.shared = shared
        return head

    @property
    def patch_layer(self) -> Prototypes:
        """The prototypes of the patches."""
        return self.last_layer if self.shared else self.last_layer2


class _FirstNormAgain(nn.Identity):
    """Holds the place of a norm in the names of the layers; the head applies its first norm there."""


def mlp_head(in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int, last_norm: bool = True) -> nn.Sequential:
    """[b, in_dim] -> [b, out_dim]: linear layers without bias, each hidden one followed by batch norm and ReLU.

    Projector and predictor of MoCo v3 (Chen et al. 2021, appendix B).

    Args:
        last_norm: the last layer is followed by a batch norm without scale and shift.

    Raises:
        ValueError: num_layers is below 1.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(width, following, bias=False))
        if index < num_layers - 1:
            layers += [nn.BatchNorm1d(following), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(following, affine=False))
    return nn.Sequential(*layers)

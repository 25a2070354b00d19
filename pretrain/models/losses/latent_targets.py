"""Normalization of a teacher's tokens, the student's targets (Baevski et al. 2022, section 3.3; Assran et al. 2023).

Every function computes in fp32, without learned weights and with the eps 1e-5 of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from pretrain.models.backbones.contract import Backbone

TargetNorm = Literal["layer", "instance", "none"]
Features = Literal["block", "ffn"]


def last_layers(backbone: Backbone, images: Tensor, count: int, features: Features) -> list[Tensor]:
    """The patch tokens [b, N, D] of each of the last `count` blocks, in order, before any norm.

    Args:
        features: "block": output of the block; "ffn": output of its feed-forward branch, before the residual sum.

    Raises:
        ValueError: the backbone has fewer blocks.
    """
    if count > backbone.depth:
        raise ValueError(f"{count} layers are to be averaged, but the backbone has {backbone.depth}")
    indices, prefix = range(backbone.depth - count, backbone.depth), backbone.num_prefix_tokens
    if features == "block":
        layers = backbone.layers(images, indices)
    else:
        layers: list[Tensor] = []
        blocks: Any = backbone.trunk.blocks
        # The output of the branch is that of ls2; of drop_path2 in timm's BEiT and EVA blocks, which multiply by gamma.
        ends = [blocks[i].ls2 if hasattr(blocks[i], "ls2") else blocks[i].drop_path2 for i in indices]
        hooks = [end.register_forward_hook(lambda _module, _given, branch: layers.append(branch)) for end in ends]
        try:
            backbone.layers(images, indices[-1:])
        finally:
            for hook in hooks:
                hook.remove()
    return [tokens[:, prefix:] for tokens in layers]


def layer_norm(tokens: Tensor) -> Tensor:
    """Normalize each token [..., D] to mean 0 and variance 1 over its channels."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def instance_norm(tokens: Tensor) -> Tensor:
    """Normalize each channel of an image [b, N, D] to mean 0 and variance 1 over its tokens."""
    return F.instance_norm(tokens.float().transpose(1, 2)).transpose(1, 2)


def normalize(tokens: Tensor, norm: TargetNorm) -> Tensor:
    """Normalize tokens [b, N, D] by the norm of that name."""
    if norm == "none":
        return tokens.float()
    return layer_norm(tokens) if norm == "layer" else instance_norm(tokens)


def average_layers(layers: Sequence[Tensor], norm: TargetNorm) -> Tensor:
    """The mean over layers of their normalized tokens, [b, N, D]."""
    total = normalize(layers[0], norm)
    for layer in layers[1:]:
        total = total + normalize(layer, norm)
    return total / len(layers)


def target_std(targets: Tensor) -> Tensor:
    """Standard deviation over all targets [..., D] of each channel, mean over channels: near 0 when they collapse."""
    rows = targets.detach().float().flatten(0, -2)
    return rows.std(dim=0, correction=0).mean()


def cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine between predictions and targets, both [..., D]."""
    return F.cosine_similarity(predictions.detach().float(), targets.detach().float(), dim=-1).mean()

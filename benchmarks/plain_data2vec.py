"""A data2vec step written plainly from the paper (Baevski et al. 2022), the baseline of `benchmarks.step`.

Every choice is the obvious one: a bias added to every head's scores, the teacher keeps the output of every layer, the
head predicts every patch and the masked ones are selected afterwards, the EMA is updated parameter by parameter.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_blocks import PlainBlock, plain_index


class PlainEncoder(nn.Module):
    """A BEiT-style ViT with class token; all of its layers."""

    def __init__(
        self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float,
        layer_scale: float,
    ):  # fmt: skip
        super().__init__()
        self.grid = img_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = nn.Parameter(torch.zeros((2 * self.grid - 1) ** 2 + 3, num_heads))
        self.rel_pos_bias = nn.ParameterDict({"relative_position_bias_table": table})
        blocks = [PlainBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_buffer("index", plain_index(self.grid), persistent=False)

    def layers(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> list[Tensor]:
        """The patches [b, N, D] after every block."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        if mask is not None and mask_token is not None:
            weight = mask[..., None].to(x.dtype)
            x = x * (1 - weight) + mask_token * weight
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        index: Any = self.index
        table: Any = self.rel_pos_bias["relative_position_bias_table"]
        bias = table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)
        outputs = []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x[:, 1:])
        return outputs


class PlainData2Vec(nn.Module):
    """Takes the batch and, by `load`, the weights of ours; `forward` gives the loss, `follow` moves the average."""

    def __init__(
        self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, num_target_layers: int,
        loss_beta: float, mlp_ratio: float = 4.0, layer_scale: float = 1e-4,
    ):  # fmt: skip
        super().__init__()
        self.encoder = PlainEncoder(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, layer_scale=layer_scale,
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.head = nn.Linear(embed_dim, embed_dim)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.num_target_layers, self.loss_beta = num_target_layers, loss_beta

    def load(self, ours: dict[str, Tensor]) -> None:
        """Take the state of our objective."""
        self.load_state_dict({name.replace("teacher.average.", "teacher."): value for name, value in ours.items()})

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        images, mask = batch["image"][:, 0], batch["mask"]
        with torch.no_grad():
            layers = self.teacher.layers(images)[-self.num_target_layers :]
            normed = torch.stack([F.layer_norm(layer.float(), layer.shape[-1:]) for layer in layers])
            target = F.layer_norm(normed.mean(0), normed.shape[-1:])
        pred = self.head(self.encoder.norm(self.encoder.layers(images, mask, self.mask_token)[-1]))
        return F.smooth_l1_loss(pred[mask].float(), target[mask], beta=self.loss_beta)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for average, value in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            average.mul_(momentum).add_(value, alpha=1 - momentum)

"""A data2vec 2.0 step written plainly from the paper (Baevski et al. 2022b): every view encodes its own copy of the
image from the patches on, the teacher keeps every branch, the decoder predicts every patch."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import plain_vit
from benchmarks.plain_ijepa import pick


class PlainData2Vec2(nn.Module):
    """`forward` takes the batch and the noise that replaces hidden patches; `follow` updates the average."""

    def __init__(
        self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, decoder_dim: int,
        decoder_layers: int, kernel: int, groups: int, top_k: int, cls_weight: float,
    ):  # fmt: skip
        super().__init__()
        self.side, self.top_k, self.cls_weight = img_size // patch_size, top_k, cls_weight
        self.encoder = plain_vit(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )
        self.encoder.pos_embed.requires_grad_(False)
        decoder: Any = nn.Module()
        widths = [embed_dim, *[decoder_dim] * (decoder_layers - 1)]
        decoder.layers = nn.ModuleList(
            nn.Conv2d(width, decoder_dim, kernel, padding=kernel // 2, groups=groups) for width in widths
        )
        decoder.proj = nn.Linear(decoder_dim, embed_dim)
        self.decoder = decoder
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Images [b, 3, H, W], mask bool [b, m, N], noise [b * m, N, D] -> loss."""
        views = mask.shape[1]
        with torch.no_grad():
            layers = self.branches(self.teacher, self.embed(self.teacher, images))[-self.top_k :]
            layers = [F.instance_norm(layer[:, 1:].transpose(1, 2).float()).transpose(1, 2) for layer in layers]
            whole = F.layer_norm(sum(layers) / len(layers), layers[0].shape[-1:])  # pyright: ignore[reportArgumentType]
        target = whole.repeat_interleave(views, 0)
        hidden = mask.flatten(0, 1)
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        keep = order[:, : int((~hidden[0]).sum())]
        x = self.embed(self.encoder, images.repeat_interleave(views, 0))
        x = torch.cat([x[:, :1], pick(x[:, 1:], keep)], dim=1)
        x = self.encoder.norm(self.encoder.blocks(x))
        tokens = noise.to(x.dtype).scatter(1, keep[..., None].expand(-1, -1, x.shape[2]), x[:, 1:])
        pred = self.decode(tokens)
        loss = self.distance(pred[hidden], target[hidden])
        cls_target = whole.mean(1).repeat_interleave(views, 0)
        return loss + self.cls_weight * self.distance(x[:, 0], cls_target)

    def embed(self, vit: Any, images: Tensor) -> Tensor:
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
        return torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def branches(self, vit: Any, x: Tensor) -> list[Tensor]:
        """What the feed-forward branch of every block adds."""
        outputs = []
        for block in vit.blocks:
            x = x + block.attn(block.norm1(x))
            outputs.append(block.mlp(block.norm2(x)))
            x = x + outputs[-1]
        return outputs

    def decode(self, tokens: Tensor) -> Tensor:
        decoder: Any = self.decoder
        x = tokens.transpose(1, 2).unflatten(2, (self.side, self.side))
        for layer in decoder.layers:
            y = layer(x)
            y = F.gelu(F.layer_norm(y.movedim(1, -1), y.shape[1:2]).movedim(-1, 1))
            x = x + y if x.shape[1] == y.shape[1] else y
        return decoder.proj(x.flatten(2).transpose(1, 2))

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target).square().sum(-1).mean() / pred.shape[-1] ** 0.5

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for average, value in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            average.mul_(momentum).add_(value, alpha=1 - momentum)

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """The weights of `pretrain.objectives.data2vec2.Data2Vec2` over a `pretrain.models.backbones.vit.ViT`."""
        self.load_state_dict({name.replace("teacher.average.", "teacher."): value for name, value in state.items()})

"""The discrete variational autoencoder for visual tokens (Ramesh et al. 2021, "DALL-E", section 2.1; here in the small
form of BEiT's code): strided convolutions, one code per patch, and a decoder.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.families import CONV_PROVIDES


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions and a 1 x 1, with a residual connection."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b, D, h, w] -> [b, D, h, w]."""
        return self.net(x) + x


class ConvEncoder(ImageEncoder):
    """The dVAE's encoder: a backbone of convolutions, each of which halves the resolution.

    Called like a ViT without a class token: images -> tokens [b, N, D], in row-major order.

    Args:
        img_size: (height, width) in pixels of the images it is built for; any multiple of `patch_size` works.
        patch_size: side of a token in pixels, a power of two.
        embed_dim: channels of every layer.

    Raises:
        ValueError: patch_size is not a power of two above 1.
    """

    num_prefix_tokens = 0
    class_token = False
    provides = CONV_PROVIDES

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int = 3, embed_dim: int = 64):
        super().__init__()
        self.depth = num_halvings(patch_size)
        self.img_size, self.patch_size = (img_size[0], img_size[1]), patch_size
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        layers: list[nn.Module] = []
        for i in range(self.depth):
            halve = nn.Conv2d(embed_dim if i else in_chans, embed_dim, 4, stride=2, padding=1)
            layers += [nn.Sequential(halve, nn.ReLU()), ResBlock(embed_dim)]
        self.layers = nn.Sequential(*layers)

    def release_model(self) -> dict[str, Any]:
        """Arguments that rebuild it, see `release`."""
        arguments = {name: getattr(self, name) for name in ("patch_size", "in_chans", "embed_dim")}
        return {"class": "conv_encoder", "img_size": list(self.img_size), **arguments}

    def map(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] -> features [b, D, H / patch_size, W / patch_size]."""
        if x.ndim != 4 or x.shape[1] != self.in_chans or x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise ValueError(
                f"images must be [b, {self.in_chans}, H, W] with sides that are multiples of {self.patch_size}, "
                f"got {list(x.shape)}"
            )
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] -> tokens [b, N, D]."""
        return self.map(x).flatten(2).transpose(1, 2)

    def forward_cls(self, x: Tensor) -> Tensor:
        """Images -> the mean of their tokens [b, D]."""
        return self(x).mean(1)

    def fixed_size_reason(self) -> str | None:
        return None


class DVAEDecoder(nn.Sequential):
    """Codes [b, D, h, w] -> images [b, C, h * patch_size, w * patch_size]."""

    def __init__(self, in_dim: int, patch_size: int, out_chans: int, dim: int):
        layers: list[nn.Module] = []
        for i in range(num_halvings(patch_size)):
            double = nn.ConvTranspose2d(dim if i else in_dim, dim, 4, stride=2, padding=1)
            layers += [nn.Sequential(double, nn.ReLU()), ResBlock(dim)]
        super().__init__(*layers, nn.Conv2d(dim, out_chans, 1))


class Codes(nn.Module):
    """From features to logits of codes, and from codes to images: the dVAE without its encoder."""

    def __init__(self, encoder: ConvEncoder, num_tokens: int, codebook_dim: int):
        super().__init__()
        self.to_logits = nn.Conv2d(encoder.embed_dim, num_tokens, 1)
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        self.decoder = DVAEDecoder(codebook_dim, encoder.patch_size, encoder.in_chans, encoder.embed_dim)

    def decode_mixture(self, weights: Tensor) -> Tensor:
        """Weights of the codes [b, K, h, w] -> images [b, C, H, W]."""
        return self.decoder(torch.einsum("bkhw,kd->bdhw", weights, self.codebook.weight.to(weights.dtype)))

    def decode(self, ids: Tensor) -> Tensor:
        """Token ids int64 [b, h, w] -> images [b, C, H, W]."""
        return self.decoder(self.codebook(ids).permute(0, 3, 1, 2))


def num_halvings(patch_size: int) -> int:
    """log2 of a patch size.

    Raises:
        ValueError: it is not a power of two above 1.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size < 2 or 2**halvings != patch_size:
        raise ValueError(f"patch_size {patch_size}: must be a power of two, 2 or more, for convolutions of stride 2")
    return halvings


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform random numbers in [0, 1), same dtype. 0 counts as the smallest step."""
    smallest = torch.finfo(uniform.dtype).eps / 4
    return -torch.log(-torch.log1p(-uniform.clamp(min=smallest)))


def gumbel_softmax(logits: Tensor, uniform: Tensor, *, temperature: float, straight_through: bool) -> Tensor:
    """Gumbel-softmax sample over dimension 1 (Jang et al. 2016): fp32, of the shape of `logits`.

    Args:
        uniform: uniform random numbers of the shape of `logits`.
        straight_through: the sample is one-hot, the gradient is that of the soft sample.
    """
    soft = ((logits.float() + gumbel(uniform).float()) / temperature).softmax(dim=1)
    if not straight_through:
        return soft
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) of the softmax over dimension 1 of `logits` [b, K, ...]: summed over all else, not the mean."""
    q = logits.float().softmax(dim=1) + 1e-10
    return (q * (q.log() + math.log(logits.shape[1]))).sum()


def reconstruction_loss(images: Tensor, reconstruction: Tensor, *, smooth_l1: bool) -> Tensor:
    """Mean error over pixels, fp32."""
    loss = F.smooth_l1_loss if smooth_l1 else F.mse_loss
    return loss(reconstruction.float(), images.float())

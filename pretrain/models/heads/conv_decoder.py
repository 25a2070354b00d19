"""data2vec 2.0's decoder (Baevski et al. 2022b, section 3.2): grouped convolutions over the full grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the fixed table of noise for masked patches: enough that two patches rarely have the same row.
NOISE_ROWS = 4096


class ConvDecoder(nn.Module):
    """Visible patches -> predictions of the masked ones, whose input is weak noise.

    A layer is convolution, LayerNorm over channels without weights, GELU; its input is added if the widths are equal.

    Args:
        noise_std: of the noise; with 0 the input at masked patches is zero.

    Raises:
        ValueError: `groups` does not divide the widths, or the kernel is even.
    """

    noise: Tensor

    def __init__(
        self,
        *,
        in_dim: int,
        embed_dim: int,
        depth: int,
        kernel: int,
        groups: int,
        grid_size: tuple[int, int],
        noise_std: float,
    ):
        super().__init__()
        if in_dim % groups or embed_dim % groups:
            raise ValueError(
                f"objective.decoder_groups: {groups} does not divide the widths {in_dim} of the encoder and "
                f"{embed_dim} of the decoder"
            )
        if kernel % 2 == 0:
            raise ValueError(f"objective.decoder_kernel: {kernel} is even; an odd one keeps the grid as it is")
        self.grid_size, self.noise_std = grid_size, noise_std
        widths = [in_dim, *[embed_dim] * (depth - 1)]
        self.layers = nn.ModuleList(
            nn.Conv2d(width, embed_dim, kernel, padding=kernel // 2, groups=groups) for width in widths
        )
        self.proj = nn.Linear(embed_dim, in_dim)
        # The same in every process and run, so that the noise depends only on the batch.
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("noise", torch.randn(NOISE_ROWS, in_dim, generator=generator), persistent=False)

    def forward(self, visible: Tensor, keep: Tensor, hidden: Tensor, uniforms: Tensor) -> Tensor:
        """Predictions [b, m, in_dim] of the patches `hidden`.

        Args:
            visible: encoded patches [b, k, in_dim] at the positions `keep`, int64 [b, k].
            hidden: positions of masked patches int64 [b, m]; with `keep`, every patch once.
            uniforms: uniform random numbers [b, N] in [0, 1) that choose the noise of each patch.
        """
        rows = (uniforms.gather(1, hidden) * NOISE_ROWS).long().clamp(max=NOISE_ROWS - 1)
        tokens = torch.cat([visible, (self.noise[rows] * self.noise_std).to(visible.dtype)], dim=1)
        place = torch.cat([keep, hidden], dim=1).argsort(dim=1)
        tokens = tokens.gather(1, place[..., None].expand_as(tokens))
        x = tokens.transpose(1, 2).unflatten(2, self.grid_size)
        for layer in self.layers:
            y = layer(x)
            y = F.gelu(F.layer_norm(y.movedim(1, -1), y.shape[1:2]).movedim(-1, 1))
            x = x + y if x.shape[1] == y.shape[1] else y
        predicted = x.flatten(2).transpose(1, 2)
        return self.proj(predicted.gather(1, hidden[..., None].expand(-1, -1, predicted.shape[2])))

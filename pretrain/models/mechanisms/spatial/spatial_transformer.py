"""Spatial transformer (Jaderberg et al. 2015, "Spatial Transformer Networks"): it looks where it chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism


class SpatialTransformer(MapMechanism):
    """Images [b, C, H, W] -> images resampled by an affine map that a small network chooses for each (section 3).

    theta [b, 2, 3] maps a place of the output to one of the input, both as (x, y) in [-1, 1] (eq. 1); sampling is
    bilinear, and what is outside of the input is 0. The last layer of the localization network starts at weight 0 and
    bias (1, 0, 0, 0, 1, 0): the identity. It reads the image at 32 x 32 pixels, whatever its size.

    Args:
        dim: C. size: (rows, columns) of the output; None: those of the input.
        align_corners: True: -1 and 1 are the centres of the corner pixels, the paper's convention; False: the outer
            edges of the corner pixels, PyTorch's default. Weights trained with one give shifted images with the other.
    """

    def __init__(self, dim: int = 3, *, size: tuple[int, int] | None = None, align_corners: bool = False):
        super().__init__()
        self.size, self.align_corners = size, align_corners
        self.localization = nn.Sequential(
            *(nn.Conv2d(dim, 8, 7), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(8, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(160, 32), nn.ReLU()),
        )
        self.theta = nn.Linear(32, 6)
        nn.init.zeros_(self.theta.weight)
        with torch.no_grad():
            self.theta.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.warp(x, self.locate(x))

    def locate(self, x: Tensor) -> Tensor:
        """theta [b, 2, 3] of images."""
        small = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
        return self.theta(self.localization(small)).unflatten(1, (2, 3))

    def grid(self, x: Tensor, theta: Tensor) -> Tensor:
        """Where each place of the output is sampled, fp32 [b, rows, columns, 2] as (x, y)."""
        rows, columns = x.shape[2:] if self.size is None else self.size
        at_y, at_x = (self._axis(length, x.device) for length in (rows, columns))
        at_y, at_x = torch.broadcast_tensors(at_y[:, None], at_x)
        places = torch.stack([at_x, at_y, torch.ones_like(at_x)], dim=-1)  # [rows, columns, 3]
        out = places.flatten(0, 1) @ theta.float().transpose(1, 2)
        return out.unflatten(1, (rows, columns))

    def warp(self, x: Tensor, theta: Tensor) -> Tensor:
        """Images resampled by theta, in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            grid = self.grid(x, theta)
            return F.grid_sample(x.float(), grid, mode="bilinear", align_corners=self.align_corners)

    def _axis(self, length: int, device: torch.device) -> Tensor:
        """Coordinates of the pixels of one axis of the output."""
        index = torch.arange(length, device=device, dtype=torch.float32)
        if self.align_corners:
            return 2 * index / max(length - 1, 1) - (1 if length > 1 else 0)
        return (2 * index + 1) / length - 1

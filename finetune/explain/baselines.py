"""Maps that know nothing of the network: what an explanation must be better than."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.explain.maps import to_cells
from finetune.explain.subjects import Grid
from pretrain.data.sampling import keyed

BASELINES = {
    "random": "a random map",
    "centre": "a Gaussian at the centre, standard deviation a quarter of the side",
    "edges": "the strength of the image's edges (Sobel)",
}
_PURPOSE = keyed.noise_purpose("random map of fovea explain")


def baseline(name: str, images: Tensor, numbers: list[int], cells: Grid, *, seed: int) -> Tensor:
    """The map `name` of BASELINES for images [b, C, h, w]: float32 [b, *cells].

    Args:
        numbers: of the images in their set; a random map depends on seed and number only.
    """
    if name == "random":
        count = cells[0] * cells[1]
        rows = np.stack([keyed.uniforms(seed, number, _PURPOSE, count=count) for number in numbers])
        return torch.from_numpy(rows).float().unflatten(1, cells)
    if name == "centre":
        down, across = (torch.linspace(-1, 1, length) * (length - 1) / length for length in cells)
        bell = torch.exp(-(down[:, None] ** 2 + across**2) / (2 * 0.5**2))
        return bell.expand(len(images), *cells).clone()
    gray = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate").cpu()
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    both = F.conv2d(gray, torch.stack([across, across.T])[:, None])
    return to_cells(both.square().sum(1).sqrt(), cells)

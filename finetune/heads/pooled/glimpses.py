"""A classifier that looks at an image in glimpses (Mnih et al. 2014, "Recurrent Models of Visual Attention").

At each of T glimpses a retina cuts patches of several scales around a location; a recurrent network reads them and the
location, and chooses where to look next. After the last glimpse it names the class. Locations are drawn from a normal
distribution, so they learn by REINFORCE: the reward is 1 for a right class, less a learned baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REINFORCE_WEIGHT = 0.01


@dataclass(frozen=True)
class Glimpse:
    """One glimpse of b images.

    Attributes:
        phi: what the retina saw, [b, features]. seen: phi and location together, [b, hidden]. state: after it.
        next: where to look then, [b, 2] as (x, y) in [-1, 1]. log_pi: log density of that choice, [b]. baseline: [b].
    """

    phi: Tensor
    seen: Tensor
    state: Tensor
    next: Tensor
    log_pi: Tensor
    baseline: Tensor


@dataclass(frozen=True)
class Look:
    """All glimpses, and log probabilities of the classes [b, K] after the last."""

    glimpses: list[Glimpse]
    log_probabilities: Tensor


class GlimpseNetwork(nn.Module):
    """Glimpse network, core, classifier, location network and baseline (sections 3.1 and 4).

    Args:
        features: length of what the retina gives (`encode` below). glimpse_hidden, location_hidden: of the layers of
            patches and of locations; their sum is the width of the recurrent state.
        std: of the choice of a location.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        num_glimpses: int = 6,
        glimpse_hidden: int = 128,
        location_hidden: int = 128,
        std: float = 0.05,
    ):
        super().__init__()
        if num_glimpses < 1:
            raise ValueError(f"num_glimpses must be at least 1, got {num_glimpses}")
        hidden = glimpse_hidden + location_hidden
        self.num_glimpses, self.std = num_glimpses, std
        self.what = nn.Sequential(nn.Linear(features, glimpse_hidden), nn.ReLU(), nn.Linear(glimpse_hidden, hidden))
        self.where = nn.Sequential(nn.Linear(2, location_hidden), nn.ReLU(), nn.Linear(location_hidden, hidden))
        self.input, self.recurrent = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.locator = nn.Sequential(nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 2), nn.Tanh())
        self.baseline = nn.Linear(hidden, 1)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, encode: Callable[[Tensor], Tensor], first: Tensor, noise: Tensor | None = None) -> Look:
        """Look at images.

        Args:
            encode: locations [b, 2] -> what the retina sees there, [b, features].
            first: the first location, [b, 2]. noise: standard normal numbers [b, T, 2] of the locations; None: their
                means.
        """
        at, state, glimpses = first, first.new_zeros(first.shape[0], self.recurrent.in_features), []
        for index in range(self.num_glimpses):
            phi = encode(at)
            seen = F.relu(self.what(phi) + self.where(at))
            state = F.relu(self.input(seen) + self.recurrent(state))
            drawn = torch.zeros_like(at) if noise is None else noise[:, index]
            at, log_pi = self._choose(state, drawn)
            baseline = self.baseline(state.detach())[:, 0]
            glimpses.append(Glimpse(phi, seen, state, at, log_pi, baseline))
        return Look(glimpses, self.fc(state).float().log_softmax(dim=1))

    def _choose(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The next location, clamped into the image, and the log density of the one that was drawn."""
        mean = self.locator(state.detach()).float()
        drawn = (mean + self.std * noise).detach()
        log_density = -((drawn - mean) / self.std).square() / 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return drawn.clamp(-1, 1), log_density.sum(1)


def retina(images: Tensor, at: Tensor, *, size: int, count: int = 1, factor: float = 1.0) -> Tensor:
    """Patches [b, count, C, size, size] around locations [b, 2] of images [b, C, H, W], zeros outside of them.

    Patch i has int(factor * the side of the one before) pixels, and is averaged down to `size`. A location (x, y) of
    [-1, 1] starts a patch at pixel int((x + 1) W / 2) - side // 2.

    Raises:
        ValueError: a side cannot be averaged to `size`.
    """
    patches, side = [], size
    for _ in range(count):
        window = max(side // size, 1)
        if side // window != size:
            raise ValueError(f"a patch of {side} pixels cannot be averaged to {size}; use a factor of a whole number")
        patches.append(F.avg_pool2d(cut(images, at, side), window))
        side = int(factor * side)
    return torch.stack(patches, dim=1)


def corners(images: Tensor, at: Tensor) -> Tensor:
    """Pixels int64 [b, 2], as (x, y), of locations; the ends are in the image or just beyond it."""
    sides = at.new_tensor([images.shape[3], images.shape[2]])
    return (0.5 * ((at + 1) * sides)).long()


def cut(images: Tensor, at: Tensor, side: int) -> Tensor:
    """Squares [b, C, side, side] whose middle is at the locations."""
    before, after = side // 2, side - side // 2
    padded = F.pad(images, (before, after, before, after)).movedim(1, 3)
    x, y = (corners(images, at)[:, :, None] + torch.arange(side, device=images.device)).unbind(1)
    sample = torch.arange(images.shape[0], device=images.device)[:, None, None]
    return padded[sample, y[:, :, None], x[:, None, :]].movedim(3, 1)


def glimpse_loss(look: Look, targets: Tensor) -> dict[str, Tensor]:
    """The hybrid loss (eq. 3 and section 4): cross-entropy, the baseline's error, REINFORCE.

    Args:
        targets: [b, K], rows that sum to 1; a class is right if it has the largest share.
    """
    classes = -(targets * look.log_probabilities).sum(1).mean()
    baselines = torch.stack([glimpse.baseline for glimpse in look.glimpses], dim=1).float()
    log_pi = torch.stack([glimpse.log_pi for glimpse in look.glimpses], dim=1)
    right = (look.log_probabilities.detach().argmax(dim=1) == targets.argmax(dim=1)).float()
    reward = right[:, None].expand_as(baselines)
    baseline = F.mse_loss(baselines, reward)
    reinforce = (-log_pi * (reward - baselines.detach())).sum(1).mean()
    total = classes + baseline + REINFORCE_WEIGHT * reinforce
    return {"loss": total, "classes": classes, "baseline": baseline, "reinforce": reinforce, "reward": reward}
